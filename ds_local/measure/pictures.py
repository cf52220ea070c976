"""Benchmarks as pictures and traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_local.charts.traces import lane, span
from ds_local.config import strict_json
from ds_local.measure.tables import Row, merged, name_of
from ds_local.outputs import new_file, write_file


def draw_bars(rows: Sequence[Row], path: Path) -> None:
    """Efficiency of each system, one panel for each number of stages and micro-batches; a mark
    shows the simulator's figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(map(name_of, rows)))
    rows = merged(rows)
    panels = list(dict.fromkeys((r["stages"], r["micro_batches"]) for r in rows))
    colors = dict(
        zip(
            dict.fromkeys(r["system"] for r in rows),
            ["#4c78a8", "#f2a541", "#72b7b2", "#e45756"],
            strict=False,
        )
    )
    figure, axes = plt.subplots(
        1,
        len(panels),
        squeeze=False,
        sharey=True,
        figsize=(2.5 + 2.6 * len(panels), 1 + 0.3 * len(names)),
        layout="constrained",
    )
    for axis, (stages, micro_batches) in zip(axes[0], panels, strict=True):
        for row in (
            r for r in rows if (r["stages"], r["micro_batches"]) == (stages, micro_batches)
        ):
            y, middle = names.index(name_of(row)), 100 * row["efficiency"]
            spread = [
                [middle - 100 * row["efficiency_lowest"]],
                [100 * row["efficiency_highest"] - middle],
            ]
            axis.barh(
                y,
                middle,
                xerr=spread,
                color=colors.get(row["system"], "#999999"),
                error_kw={"linewidth": 0.8},
            )
            if row["simulated_efficiency"] is not None:
                axis.plot(100 * row["simulated_efficiency"], y, "k|", markersize=9)
        axis.set_title(f"P = {stages}, M = {micro_batches}", fontsize=9)
        axis.set_xlim(0, 105)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(
        "% of ideal; bar: median of the repetitions, line: their spread, mark: simulated",
        fontsize=8,
    )
    with new_file(path) as picture:
        figure.savefig(picture, dpi=130)
    plt.close(figure)


def write_trace(events_of_ranks: Sequence[Sequence[tuple[str, float, float]]], path: Path) -> None:
    """A Chrome/Perfetto trace with a lane for each stage."""
    rows: list[Row] = []
    for stage, events in enumerate(events_of_ranks):
        rows.append(lane(stage))
        rows += [span(what, stage, start, end) for what, start, end in events]
    write_file(path, strict_json.dumps({"traceEvents": rows}))
