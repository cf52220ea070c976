"""Time lines as pictures and traces. matplotlib is imported only to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_local.schedules.schedule import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from ds_local.schedules.simulator import Timeline


def chrome_trace(timeline: Timeline, microseconds_per_unit: float = 1e6) -> dict[str, Any]:
    """The step alone as a Chrome/Perfetto trace, one lane per stage."""
    return {
        "traceEvents": [
            {
                "name": str(e.action),
                "cat": e.action.kind,
                "ph": "X",
                "pid": 0,
                "tid": e.stage,
                "ts": e.start * microseconds_per_unit,
                "dur": (e.end - e.start) * microseconds_per_unit,
                "args": {"segment": e.action.segment, "micro_batch": e.action.micro_batch},
            }
            for e in timeline.events
        ]
        + [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": s, "args": {"name": f"stage {s}"}}
            for s in range(timeline.schedule.num_stages)
        ]
    }


COLORS = {
    FORWARD: "#4c78a8",
    BACKWARD: "#f2a541",
    INPUT_GRADIENT: "#e45756",
    WEIGHT_GRADIENT: "#72b7b2",
}
NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRADIENT: "input gradient only",
    WEIGHT_GRADIENT: "weight gradient",
}


def draw(timelines: Sequence[Timeline], path: str | Path) -> None:
    """Draw time lines under each other on one time axis, one row per stage; idle time stays
    white."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = [t.schedule.num_stages for t in timelines]
    figure, axes = plt.subplots(
        len(timelines),
        1,
        sharex=True,
        squeeze=False,
        figsize=(12, 0.6 + 0.36 * sum(rows) + 0.7 * len(rows)),
        height_ratios=rows,
        layout="constrained",
    )
    few = max(t.schedule.num_micro_batches for t in timelines) <= 16 and max(rows) <= 16
    kinds = set()
    for axis, timeline in zip(axes[:, 0], timelines, strict=True):
        for event in timeline.events:
            backprop = (
                event.action.kind != FORWARD
                and timeline.schedule.rows[event.action.micro_batch].mode == "backprop"
            )
            kinds.add(event.action.kind)
            axis.broken_barh(
                [(event.start, event.end - event.start)],
                (event.stage - 0.42, 0.84),
                facecolors=COLORS[event.action.kind],
                edgecolor="white",
                linewidth=0.6,
                hatch="//" if backprop and "x" in timeline.schedule.name else None,
            )
            if few:
                axis.text(
                    (event.start + event.end) / 2,
                    event.stage,
                    event.action.micro_batch,
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white",
                )
        axis.set_yticks(
            range(timeline.schedule.num_stages),
            [f"stage {s}" for s in range(timeline.schedule.num_stages)],
        )
        axis.invert_yaxis()
        axis.set_title(
            f"{timeline.schedule.name}: {timeline.makespan:g} alone, {timeline.steady_period:g} a "
            f"step in a long run, idle {timeline.idle_share:.0%}",
            loc="left",
            fontsize=9,
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time")
    figure.legend(
        handles=[Patch(color=COLORS[k], label=NAMES[k]) for k in COLORS if k in kinds],
        loc="outside lower right",
        ncols=4,
        fontsize=8,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
