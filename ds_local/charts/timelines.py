"""Time lines: bands of lanes under each other on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ds_local.charts.plots import legend, ticks
from ds_local.charts.style import KINDS
from ds_local.charts.svg import Svg, text_width


class Piece(NamedTuple):
    """A stretch of time in which a stage did one thing."""

    stage: int
    step: int
    kind: str  # one of `style.KINDS`
    start: float
    end: float
    name: str  # short, as on the piece: "3"
    tip: str  # long: "forward of micro-batch 3"


class Band(NamedTuple):
    """The lanes of one schedule, one for each stage."""

    title: str
    note: str  # right of the title; where there is no room, only what follows its last semicolon
    num_stages: int
    pieces: Sequence[Piece]


def draw_bands(
    bands: Sequence[Band],
    label: str,
    width: float = 860,
    lane: float = 22,
    unit: str = "time, in forwards of a stage",
    span: tuple[float, float] | None = None,
) -> Svg:
    """Bands under each other. Steps alternate between full and pale colours; where a lane is
    empty its stage waits.

    Args:
        label: what is to be seen, for those who cannot see it.
        lane: height of a stage's lane.
        span: of the time axis; default all of the pieces.
    """
    left, right, head = 64, 16, 38
    begin, end = span or (
        min(p.start for band in bands for p in band.pieces),
        max(p.end for band in bands for p in band.pieces),
    )
    scale = (width - left - right) / max(end - begin, 1e-12)
    svg = Svg(width, sum(head + band.num_stages * lane for band in bands), label)
    top = 2.0
    for band in bands:
        svg.text(16, top + 25, band.title, 14, "ink title")
        room = width - right - 16 - text_width(band.title, 14) - 20
        fits = text_width(band.note, 12.5) < room
        note = band.note if fits else band.note.rpartition("; ")[2]
        svg.text(width - right, top + 25, note, 12.5, "faint", "end")
        top += head
        _lanes(svg, band, (left, top, lane), begin, scale)
        top += band.num_stages * lane
    _axis(svg, (begin, end), (left, top, scale), unit)
    kinds = {piece.kind for band in bands for piece in band.pieces}
    names = [(kind, f"{kind}  {KINDS[kind][0]}") for kind in KINDS if kind in kinds]
    legend(svg, left, top + 46, [*names, ("track", "idle")])
    return svg


def _lanes(
    svg: Svg, band: Band, place: tuple[float, float, float], begin: float, scale: float
) -> None:
    left, top, lane = place
    last = max((piece.end for piece in band.pieces), default=begin)
    first = min((piece.step for piece in band.pieces), default=0)
    for stage in range(band.num_stages):
        y = top + stage * lane
        svg.text(left - 8, y + lane / 2 + 4, f"stage {stage}", 11.5, "faint", "end")
        svg.rect(left, y + 1.5, (last - begin) * scale, lane - 3, rx=2, cls="track")
    for piece in band.pieces:
        x, long = left + (piece.start - begin) * scale, (piece.end - piece.start) * scale
        y, pale = top + piece.stage * lane, " late" if (piece.step - first) % 2 else ""
        svg.rect(x + 0.5, y + 1.5, long - 1, lane - 3, piece.tip, rx=2, cls=piece.kind + pale)
        size = min(11.0, lane * 0.5)
        if text_width(piece.name, size) < long - 2:
            middle = x + long / 2
            svg.text(middle, y + lane / 2 + 4, piece.name, size, f"on{piece.kind}", "middle")


def _axis(
    svg: Svg, span: tuple[float, float], place: tuple[float, float, float], unit: str
) -> None:
    left, top, scale = place
    for tick, text in ticks(0.0, span[1] - span[0], 8):
        x = left + tick * scale
        svg.line(x, top + 2, x, top + 7)
        svg.text(x, top + 19, text, 11, "faint", "middle")
    middle = left + (span[1] - span[0]) * scale / 2
    svg.text(middle, top + 35, unit, 11, "faint", "middle")
