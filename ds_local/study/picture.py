"""The charts of the quality study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from ds_local.charts.dots import Dot, DotPanel, draw_dots
from ds_local.charts.plots import Curve, chart
from ds_local.charts.style import colors_of
from ds_local.charts.svg import Svg
from ds_local.study.methods import shown
from ds_local.study.recipes import PRESETS
from ds_local.study.results import runs_of

Row = dict[str, Any]  # of quality.json

# what is compared: small steps, and large ones with longer runs
SMALL, LARGE = ("cpu", 1.0), ("cpu-large-batch", 3.0)
SEGMENTS = 4
COMPARED = (
    "backprop",
    "chunked 2, backprop tail 40 %",
    "chunked 2, backprop tail 20 %",
    "chunked 2, last 40 % half corrected",
    "chunked 2",
    "mixed 1/4, tail 40 %",
    "mixed 1/4",
    "local",
)
FAST, SLOW = "M=4, c/F=0", "M=4, c/F=1"


class Curves(NamedTuple):
    """What a chart of losses against tokens and against time shows."""

    preset: str
    methods: tuple[str, ...]
    limits: tuple[float, float]  # of the loss
    titles: tuple[str, str]


CURVES = Curves(
    "cpu",
    (
        "backprop",
        "chunked 2",
        "chunked 2, backprop tail 40 %",
        "mixed 1/4, tail 40 %",
        "local",
    ),
    (1.8, 2.25),
    (
        "At equal tokens backpropagation is ahead",
        "At equal time chunks of two are level with it",
    ),
)
AT_THE_RATIO = Curves(
    "cpu-gpt2-ratio",
    (
        "backprop, WSD",
        "chunked 2, WSD",
        "chunked 2, backprop tail 40 %, WSD",
        "local, backprop tail 40 %, WSD",
        "local, 1/8 of the vocabulary, tail 40 %, WSD",
    ),
    (2.35, 3.1),
    (
        "At equal tokens chunks of two with a tail are ahead",
        "At equal time all chunks are",
    ),
)


def compared(
    rows: Sequence[Row], setting: tuple[str, float], methods: Sequence[str] = COMPARED
) -> dict[str, Row]:
    """Method -> its row, by default of what the page of the study compares, in that order."""
    found = {
        row["method"]: row
        for row in rows
        if (row["preset"], row["step_factor"], row["segments"]) == (*setting, SEGMENTS)
    }
    return {method: found[method] for method in methods if method in found}


def gaps_chart(rows: Sequence[Row]) -> str:
    """Perplexity behind backpropagation, and the time to equal loss, of the compared methods."""
    both = [compared(rows, setting) for setting in (SMALL, LARGE)]
    steps = [
        f"steps of {PRESETS[preset].step_tokens:,} tokens, "
        f"{PRESETS[preset].steps * factor:,.0f} of them"
        for preset, factor in (SMALL, LARGE)
    ]
    gaps, times = [], []
    for method in both[0]:
        there = [(known.get(method), bool(n)) for n, known in enumerate(both)]
        dots = [(row, ring) for row, ring in there if row is not None]
        gaps.append(
            [
                Dot(row["gap_percent"], min(row["gaps_percent"]), max(row["gaps_percent"]), ring)
                for row, ring in dots
            ]
        )
        times.append([(row["time_to_equal_loss_split"], ring) for row, ring in dots])

    def panel(name: str, condition: str) -> DotPanel:
        found = [[Dot(of[condition], ring=ring) for of, ring in row if of] for row in times]
        return DotPanel(name, found, mark=(1.0, "1F1B"))

    return draw_dots(
        "Chunks of two come near backpropagation, nearest with large steps and a tail of it",
        [shown(method) for method in both[0]],
        [
            DotPanel("perplexity gap, %", gaps),
            panel("time, fast links", FAST),
            panel("time, slow links", SLOW),
        ],
        (steps[0], steps[1]),
    ).file()


def curves_chart(
    results: Sequence[Mapping[str, Any]], rows: Sequence[Row], wanted: Curves = CURVES
) -> str:
    """Validation loss against tokens, and against predicted time."""
    of_preset = [dict(r) for r in results if r["preset"] == wanted.preset]
    known = compared(rows, (wanted.preset, 1.0), wanted.methods)
    runs = {
        method: {run["seed"]: run["curve"] for run in runs_of(of_preset, method, SEGMENTS, 1.0)}
        for method in known
    }
    longest = max(len(curve) for curves in runs.values() for curve in curves.values())
    # of a few runs only the end was kept
    whole = [{s for s, c in curves.items() if len(c) == longest} for curves in runs.values()]
    seeds = sorted(set.intersection(*whole))
    by_tokens, by_time = [], []
    colors = colors_of([shown(method) for method in runs])
    for method, curves in runs.items():
        name, scale = shown(method), known[method]["predicted_time_ratios_split"][FAST]
        together = zip(*(curves[seed] for seed in seeds), strict=True)
        points = [(points[0][0] / 1e6, mean(loss for _, loss in points)) for points in together]
        points = [(x, loss) for x, loss in points if loss < wanted.limits[1]]
        by_tokens.append(Curve(name, colors[name], points))
        by_time.append(Curve(name, colors[name], [(x * scale, y) for x, y in points]))
    both = Svg(860, 0, "Validation loss against tokens and against time")
    which = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    y_name = f"validation loss, nats, {which}; the later part of the runs"
    for n, (shown_curves, x_name) in enumerate(
        (
            (by_tokens, "million tokens"),
            (
                by_time,
                "simulated time, 4 stages, 4 micro-batches, split; 1F1B takes 1 a million tokens",
            ),
        )
    ):
        size, limits = (860.0, 270.0), wanted.limits
        part = chart(wanted.titles[n], shown_curves, x_name, y_name, size=size, y_range=limits)
        both.embed(part, 0, n * 276)
    return both.file()
