"""The page of the campaign that kills single stages, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ds_local.charts.plots import Curve, Mark, chart
from ds_local.charts.style import SERIES
from ds_local.measure.tables import grid

_HEADER = (
    "stages x replicas, depth of links",
    "kills",
    "other jobs that ended",
    "outage in s: median, most",
    "updates lost",
    "lost stage-seconds a kill",
    "the same, all restart",
)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# Stages that die alone: what was measured",
        "",
        "Written by `scripts/stage_alone.py`; every kill is in",
        "[stage-alone.json](stage-alone.json). What it means: [when a node dies](../units.md).",
        "",
    ]
    table = []
    for row in rows:
        outages = [kill["outage_seconds"] for kill in row["kills"] if "outage_seconds" in kill]
        base = row.get("restart_all")
        cells = (
            f"{row['layout']}, {row['depth']}",
            len(row["kills"]),
            row["other_ends"],
            f"{median(outages):.1f}, {max(outages):.1f}",
            row["lost_steps"],
            f"{row['lost_stage_seconds']:.1f}",
            "-" if base is None else f"{base['lost_stage_seconds']:.1f} ({base['kills']} kills)",
        )
        table.append(cells)
    lines += [grid(_HEADER, table), ""]
    for row in rows:
        lines += [_told(row), ""]
    return "\n".join(lines)


def _told(row: Mapping[str, Any]) -> str:
    parts = [
        f"**{row['layout']}**, {row['date']}, {row['machine']}: {row['steps']} steps, a checkpoint "
        f"every {row['saves_every']}, links {row['depth']} messages deep; "
        f"{row['quiet_seconds']:.0f} s undisturbed, {row['train_seconds']:.0f} s with the kills."
    ]
    if "losses_compared" in row:
        parts.append(
            f"Units below the dead ones: {row['losses_equal']} of {row['losses_compared']} losses "
            "equal to the bit those of the undisturbed run."
        )
    pairs = [pair for pair in row["validation"].values() if None not in pair]
    shown = "; ".join(f"{quiet:.4f} and {killed:.4f}" for quiet, killed in pairs)
    parts.append(f"Validation losses at the end, undisturbed and killed, by unit: {shown}.")
    return " ".join(parts)


def picture(row: Mapping[str, Any]) -> str:
    """Validation loss of the last unit, undisturbed and with the kills, as SVG."""
    names = ("nobody dies", f"{len(row['kills'])} kills")
    curves = [
        Curve(name, color, [(step, loss) for step, loss in points])
        for name, color, points in zip(names, SERIES, row["curves"], strict=False)
    ]
    marks = [Mark(kill["step"], "", bad=True) for kill in row["kills"]]
    return chart(
        f"{row['layout']}: the model's validation loss with and without deaths",
        curves,
        "step",
        "validation loss",
        marks,
    ).file()
