"""The charts of a run's report, each from what a run folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ds_local.charts.plots import Curve, Mark, bars, chart
from ds_local.charts.style import color_of
from ds_local.charts.svg import Svg, text_width
from ds_local.training.run_record import RunRecord, thinned


def curves_of(run: RunRecord, name: str, per: str = "segment") -> list[Curve]:
    """A figure of every segment, or (`per` "stage") of every stage."""
    numbers = run.segments if per == "segment" else run.stages
    count = max(numbers, default=0) + 1
    return [
        Curve(f"{per} {n}", color_of(n, count), thinned(run.points("train", n, name, per=per)))
        for n in numbers
    ]


def draw_losses(run: RunRecord) -> Svg:
    count = max(run.segments) + 1
    curves = []
    for segment in run.segments:
        color = color_of(segment, count)
        validation = run.points("validation", segment, "loss")
        name = f"segment {segment}"
        train = thinned(run.points("train", segment, "loss"))
        curves.append(Curve("" if validation else name, color, train))
        curves.append(Curve(name, color, validation, dots=True))
    marks = [Mark(row["nonfinite_step"], row["nonfinite"], bad=True) for row in run.events]
    return chart(
        "Loss of every segment: training thin, validation with dots",
        curves,
        "step",
        "nats per token",
        [*marks, *(Mark(start, "") for start, *_ in run.phases[1:])],
        size=(1140, 380),
        y_range=(None, without_start(curves)),
        shades=run.phases,
    )


def without_start(curves: Sequence[Curve]) -> float | None:
    """An upper end of the y axis that leaves out the fall in the first twentieth of the run."""
    values = [
        y
        for curve in curves
        for x, y in curve.points
        if y is not None and x > 0.05 * max(x for x, _ in curve.points)
    ]
    return max(values) * 1.02 if values else None


def draw_rates(run: RunRecord) -> Svg:
    curves = curves_of(run, "lr")
    if len({tuple(c.points) for c in curves}) == 1:
        curves = [curves[0]._replace(name="all segments")]
    return chart("Learning rate", curves, "step", "", y_range=(0.0, None), size=(560, 260))


def draw_norms(run: RunRecord) -> Svg:
    curves = curves_of(run, "grad_norm")
    high = without_start(curves)
    title = "Gradient norm before clipping"
    return chart(title, curves, "step", "", y_range=(0.0, high), size=(560, 260))


def draw_pace(run: RunRecord) -> Svg:
    points = thinned(run.pace)
    middle = median([y for _, y in points if y is not None] or [0.0])
    title = f"Tokens per second: {middle:,.0f} in the median"
    curve = Curve("", color_of(0, 1), points)
    return chart(
        title, [curve], "step", "pace of the slowest stage", y_range=(0.0, None), size=(560, 260)
    )


def draw_idle(run: RunRecord) -> Svg:
    curves = curves_of(run, "idle_share", "stage")
    return chart(
        "Idle share of every stage",
        curves,
        "step",
        "",
        y_range=(0.0, 1.0),
        percent=True,
        size=(560, 260),
    )


def draw_step_times(run: RunRecord) -> Svg:
    names, parts = [], []
    for stage in run.stages:
        seconds, idle = run.mean("step_seconds", stage) or 0.0, run.mean("idle_share", stage) or 0.0
        names.append(f"stage {stage}")
        working, waiting = seconds * (1 - idle), seconds * idle
        parts.append(
            [
                ("F", working, f"works {working:.4g} s"),
                ("I", waiting, f"waits {waiting:.4g} s"),
            ]
        )
    title = "Where the time of a step goes, in the mean"
    return bars(
        title, names, parts, "seconds", 1140, [("F", "works"), ("I", "waits for a neighbour")]
    )


def draw_link_waits(run: RunRecord) -> Svg:
    """A lane for each stage: as high as its idle share, in the colour of the link that it waited
    for longest."""
    links = sorted({link for stage in run.stages for link in run.waits(stage)})
    lane, left, top, width = 40.0, 76.0, 36.0, 1140.0
    svg = Svg(width, top + lane * len(run.stages) + 22, "What each stage waited for")
    svg.text(
        16,
        22,
        "What each stage waited for, over the steps: as high as its idle share",
        14,
        "ink title",
    )
    for row, stage in enumerate(run.stages):
        bottom = top + (row + 1) * lane
        svg.text(left - 8, bottom - 14, f"stage {stage}", 11.5, "faint", "end")
        svg.rect(left, bottom - lane + 4, width - left - 16, lane - 4, rx=2, cls="track")
        stretches = run.waiting(stage)
        wide = (width - left - 16) / max(len(stretches), 1)
        for n, (first, last, share, link) in enumerate(stretches):
            if link is None:
                continue
            high = max((lane - 4) * min(share, 1.0), 1.0)
            tip = f"steps {first} to {last}: idle {share:.1%}, longest for the {link}"
            color = color_of(links.index(link), len(links))
            svg.rect(left + n * wide, bottom - high, wide, high, tip, fill=color)
    base = top + lane * len(run.stages)
    svg.text(left, base + 16, "first step", 11, "faint")
    svg.text(width - 16, base + 16, "last step", 11, "faint", "end")
    names = [(link, color_of(n, len(links))) for n, link in enumerate(links)]
    at, y = left, base + 28
    for link, color in names:
        if at + text_width(link) + 40 > width:
            at, y = left, y + 19
        svg.rect(at, y, 12, 12, rx=2, fill=color)
        svg.text(at + 17, y + 10.5, link)
        at += text_width(link) + 40
    svg.height = y + 24 if links else svg.height
    return svg
