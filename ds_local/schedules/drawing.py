"""Time lines and route tables as pictures; traces. matplotlib is imported only to write PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_local.charts.style import KINDS, color_of
from ds_local.charts.svg import Svg
from ds_local.charts.timelines import Band, Piece
from ds_local.charts.traces import lane, span
from ds_local.schedules.routes import Routes
from ds_local.schedules.schedule import Event, Schedule
from ds_local.schedules.simulator import Timeline

_CELL = 26  # of a route table


def chrome_trace(timeline: Timeline, microseconds_per_unit: float = 1e6) -> dict[str, Any]:
    """The step alone as a Chrome/Perfetto trace, one lane per stage."""
    events = [
        span(
            str(e.action),
            e.stage,
            e.start,
            e.end,
            unit=microseconds_per_unit,
            cat=e.action.kind,
            args={"segment": e.action.segment, "micro_batch": e.action.micro_batch},
        )
        for e in timeline.events
    ]
    return {"traceEvents": events + [lane(s) for s in range(timeline.schedule.num_stages)]}


def band_of(timeline: Timeline, events: Sequence[Event], title: str | None = None) -> Band:
    """A schedule's lanes, drawn with what happened in its first steps.

    Args:
        events: of these steps, of all stages.
        title: default the schedule's name.
    """
    steps = 1 + max((event.step for event in events), default=0)
    taken = max(event.end for event in events)
    drawn = "one step takes" if steps == 1 else f"{steps} steps take"
    note = f"{drawn} {taken:.6g}; in a long run {timeline.steady_period:.6g} a step, "
    note += f"idle {timeline.idle_share:.0%}"
    schedule = timeline.schedule
    pieces = [_piece(schedule, event) for event in events]
    return Band(title or schedule.name, note, schedule.num_stages, pieces)


def _piece(schedule: Schedule, event: Event) -> Piece:
    action = event.action
    several = len(schedule.stage_of) > schedule.num_stages
    name = f"{action.segment}:{action.micro_batch}" if several else str(action.micro_batch)
    tip = f"micro-batch {action.micro_batch}, segment {action.segment}: {KINDS[action.kind][0]}"
    if len({row.mode for row in schedule.rows}) > 1:
        tip += f" ({schedule.rows[action.micro_batch].mode})"
    return Piece(event.stage, event.step, action.kind, event.start, event.end, name, tip)


def draw_routes(tables: Sequence[tuple[str, Routes]]) -> Svg:
    """Route tables as matrices side by side: a row for each loss, in its colour; a column for each
    segment. A number in a cell is a weight other than 1.

    Args:
        tables: with a caption each, "" for none.
    """
    count = tables[0][1].num_segments
    wide = 62 + count * _CELL + 16
    label = "; ".join(f"route table of {routes.mode}" for _, routes in tables)
    svg = Svg(wide * len(tables), 44 + count * _CELL + (30 if tables[0][0] else 12), label)
    for n, (caption, routes) in enumerate(tables):
        _matrix(svg, routes, n * wide + 62)
        svg.text(n * wide + 62, svg.height - 12, caption, 11.5, "faint")
    return svg


def _matrix(svg: Svg, routes: Routes, left: float) -> None:
    count, top, cell = routes.num_segments, 44, _CELL
    svg.text(left, 18, "trains segment", 11.5, "faint")
    for n in range(count):
        x, y = left + n * cell, top + n * cell
        svg.text(x + cell / 2, top - 8, n, 11.5, "ink", "middle")
        svg.text(left - 8, y + cell / 2 + 4, f"loss {n}", 11.5, "ink", "end")
        for segment in range(count):
            weight = routes.weights.get(n, {}).get(segment)
            box = (left + segment * cell + 1.5, y + 1.5, cell - 3, cell - 3)
            if weight is None:
                svg.rect(*box, rx=3, cls="track")
                continue
            weight *= routes.loss_weights[n]
            svg.rect(*box, f"loss {n} trains segment {segment}", rx=3, fill=color_of(n, count))
            if weight != 1:
                middle = left + segment * cell + cell / 2
                svg.text(middle, y + cell / 2 + 4, f"{weight:.3g}", 10.5, "onF", "middle")


def draw(bands: Sequence[Band], path: str | Path) -> None:
    """Draw time lines under each other on one time axis, one row per stage, as a PNG; idle time
    stays white, steps alternate between full and pale colours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = [band.num_stages for band in bands]
    figure, axes = plt.subplots(
        len(bands),
        1,
        sharex=True,
        squeeze=False,
        figsize=(12, 0.6 + 0.36 * sum(rows) + 0.7 * len(rows)),
        height_ratios=rows,
        layout="constrained",
    )
    end = max(piece.end for band in bands for piece in band.pieces)
    for axis, band in zip(axes[:, 0], bands, strict=True):
        for piece in band.pieces:
            _, color, ink = KINDS[piece.kind]
            length = piece.end - piece.start
            axis.broken_barh(
                [(piece.start, length)],
                (piece.stage - 0.42, 0.84),
                facecolors=color,
                edgecolor="white",
                linewidth=0.6,
                alpha=0.62 if piece.step % 2 else 1.0,
            )
            if length / end > 0.009 * len(piece.name):
                place = ((piece.start + piece.end) / 2, piece.stage)
                axis.text(*place, piece.name, ha="center", va="center", fontsize=7, color=ink)
        axis.set_yticks(range(band.num_stages), [f"stage {s}" for s in range(band.num_stages)])
        axis.invert_yaxis()
        axis.set_title(f"{band.title}: {band.note}", loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time")
    kinds = {piece.kind for band in bands for piece in band.pieces}
    figure.legend(
        handles=[Patch(color=c, label=name) for k, (name, c, _) in KINDS.items() if k in kinds],
        loc="outside lower right",
        ncols=4,
        fontsize=8,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
