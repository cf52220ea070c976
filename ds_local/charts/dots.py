"""Rows of dots or bars, with a name each, in panels beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ds_local.charts.plots import number, ticks
from ds_local.charts.style import color_of_kind
from ds_local.charts.svg import Svg, text_width

_WIDTH = 860
_ROW, _GAP = 26.0, 26.0
_APART = 5.0  # of the two kinds of dots in a row, from its middle


class Dot(NamedTuple):
    """A value, and how far it was spread."""

    value: float
    low: float | None = None
    high: float | None = None
    ring: bool = False  # drawn hollow: of the second kind that the drawing compares


class DotPanel(NamedTuple):
    """One axis, and the dots of each row on it."""

    name: str
    rows: Sequence[Sequence[Dot]]
    bars: bool = False  # from zero, with the value at the end
    mark: tuple[float, str] | None = None  # a value to compare with
    end: float | None = None  # a value that the axis reaches at least, for panels of one scale


def draw_dots(
    title: str,
    names: Sequence[str],
    panels: Sequence[DotPanel],
    kinds: tuple[str, str] | None = None,
    colors: Sequence[str] | None = None,
) -> Svg:
    """Rows under each other, the same in every panel.

    Args:
        names: of the rows.
        kinds: what filled and hollow dots are.
        colors: of the rows; default those of the schemes they name.
    """
    left = 16 + max(text_width(name, 11.5) for name in names) + 12
    across = (_WIDTH - 20 - left - _GAP * (len(panels) - 1)) / len(panels)
    top = 56.0 if kinds is None else 76.0
    svg = Svg(_WIDTH, top + _ROW * len(names) + 34, title)
    svg.text(16, 24, title, 14, "ink title")
    if kinds is not None:
        at = 16.0
        for kind, ring in zip(kinds, (False, True), strict=True):
            _dot(svg, at + 5, 43, "currentColor", ring)
            svg.text(at + 15, 47, kind, 11.5, "ink")
            at += 15 + text_width(kind, 11.5) + 24
    colors = colors or [color_of_kind(name) for name in names]
    for n, name in enumerate(names):
        svg.text(left - 10, top + n * _ROW + 17, name, 11.5, "ink", "end")
    for count, panel in enumerate(panels):
        _panel(svg, panel, colors, (left + count * (across + _GAP), top), across)
    return svg


def _panel(
    svg: Svg, panel: DotPanel, colors: Sequence[str], corner: tuple[float, float], across: float
) -> None:
    x0, top = corner
    values = [v for row in panel.rows for dot in row for v in dot[:3] if v is not None]
    values += [panel.mark[0]] if panel.mark else [] if values else [0.0]
    values += [] if panel.end is None else [panel.end]
    low, high = (0.0 if panel.bars else min(values)), max(values)
    room = 0.0 if panel.bars else 0.05 * (high - low)
    # a bar leaves room for its value
    scale = (across - (46 if panel.bars else 0)) / ((high - low + 2 * room) or 1.0)

    def place(value: float) -> float:
        return x0 + (value - low + room) * scale

    bottom = top + _ROW * len(panel.rows)
    svg.text(x0, top - 8, panel.name, 11.5, "ink title")
    for n in range(len(panel.rows)):
        svg.rect(x0, top + n * _ROW + 1.5, across, _ROW - 3, rx=2, cls="track")
    for value, text in ticks(low, high, 5):
        svg.line(place(value), top, place(value), bottom + 4)
        svg.text(place(value), bottom + 17, text, 11, "faint", "middle")
    if panel.mark is not None:
        svg.line(place(panel.mark[0]), top, place(panel.mark[0]), bottom + 4, cls="strong dash")
        svg.text(place(panel.mark[0]), bottom + 30, panel.mark[1], 11, "ink", "middle")
    for n, (row, color) in enumerate(zip(panel.rows, colors, strict=True)):
        y = top + (n + 0.5) * _ROW
        if panel.bars:
            for dot in row:
                end = place(dot.value)
                svg.rect(x0, y - 8, end - x0, 16, number(dot.value), rx=2, fill=color)
                svg.text(end + 5, y + 4, number(dot.value), 11, "ink")
            continue
        for dot in row:
            at = y + (_APART if dot.ring else -_APART) * (len({d.ring for d in row}) - 1)
            if dot.low is not None and dot.high is not None and dot.low < dot.high:
                ends = place(dot.low), place(dot.high)
                svg.line(ends[0], at, ends[1], at, cls=None, stroke=color, stroke_width=1.6)
            _dot(svg, place(dot.value), at, color, dot.ring)


def _dot(svg: Svg, x: float, y: float, color: str, ring: bool) -> None:
    known = {"cls": "ink"} if color == "currentColor" else {"fill": color}
    svg.add("circle", cx=x, cy=y, r=4.5, **known)
    if ring:
        svg.add("circle", cx=x, cy=y, r=2.3, cls="card")
