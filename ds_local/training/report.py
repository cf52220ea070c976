"""The report of a run: one page that says what happened, and where to look next.

`write` is called by the training loop at every evaluation and at the end, and by `ds-local report`,
which also puts several runs beside each other. The page needs nothing else and no network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from ds_local.charts.pages import page, table
from ds_local.charts.plots import Curve, chart
from ds_local.charts.style import color_of
from ds_local.charts.svg import Svg
from ds_local.charts.timelines import draw_bands
from ds_local.checkpoints.metrics_file import of_full_model
from ds_local.errors import counted
from ds_local.outputs import write_file
from ds_local.training.differences import flat
from ds_local.training.report_advice import what_next
from ds_local.training.report_charts import (
    draw_idle,
    draw_link_waits,
    draw_losses,
    draw_norms,
    draw_pace,
    draw_rates,
    draw_step_times,
    without_start,
)
from ds_local.training.report_tables import (
    events_table,
    memory_table,
    samples_table,
    waits_table,
)
from ds_local.training.run_record import Points, RunRecord, thinned


def write(runs: Sequence[RunRecord], path: str | Path) -> None:
    """Write or replace the report of one run, or of several beside each other.

    Raises:
        OutputError: when it cannot be written.
    """
    write_file(path, report(runs))


def report(runs: Sequence[RunRecord]) -> str:
    """The page."""
    drawings: list[Svg] = []
    if len(runs) == 1:
        body, title = _one(runs[0], drawings), runs[0].name
    else:
        title = ", ".join(run.name for run in runs)
        body = _several(runs, drawings)
        for run in runs:
            body += f"<details><summary>{escape(run.name)}</summary>{_one(run, drawings)}</details>"
    hover = [drawing.data for drawing in drawings]
    return page(f"{title}: report", body, "hover.js", hover)


# --- one run --------------------------------------------------------------------------------------


def _one(run: RunRecord, drawings: list[Svg]) -> str:
    def box(drawing: Svg) -> str:
        return _box(drawing, drawings)

    advice = "".join(f"<li>{escape(line)}</li>" for line in what_next(run))
    parts = [
        f"<h1>{escape(run.name)}</h1><p class='lead'>{escape(_lead(run))}</p>",
        "<div class='box'><h2 style='margin-top:4px'>What to look at next</h2>"
        f"<ul>{advice}</ul></div>",
        box(draw_losses(run)),
        f"<div class='pair'>{box(draw_rates(run))}{box(draw_norms(run))}</div>",
        "<h2>Time</h2>",
        f"<div class='pair'>{box(draw_pace(run))}{box(draw_idle(run))}</div>",
        box(draw_step_times(run)),
        box(draw_link_waits(run)),
        waits_table(run),
    ]
    step = run.step_picture()
    if step is not None:
        band, unit, how = step
        lanes = draw_bands([band], "the schedule of one step", unit=unit)
        parts += ["<h2>One step</h2>", box(lanes), f"<p class='lead'>{escape(how)}</p>"]
    if run.samples:
        parts += ["<h2>What the model writes</h2>", samples_table(run)]
    parts += ["<h2>Memory</h2>", memory_table(run), "<h2>Not finite</h2>", events_table(run)]
    return "".join([*parts, "<h2>Settings</h2>", _settings(run)])


def _lead(run: RunRecord) -> str:
    layout = run.facts.get("layout", {})
    words = [f"{run.last_step:,} steps, {run.tokens:,} tokens"]
    if {"stages", "replicas"} <= layout.keys():
        stages, replicas = counted(layout["stages"], "stage"), layout["replicas"]
        words.insert(0, f"{stages} x {counted(replicas, 'replica')}")
    if run.phases:
        words.insert(0, ", then ".join(dict.fromkeys(name for *_, name in run.phases)))
    asked = run.facts.get("arguments", {}).get("max_steps")
    if isinstance(asked, int) and run.last_step < asked:
        words.append(f"of {asked:,} steps so far")
    return " \u00b7 ".join(words)


# --- its charts -----------------------------------------------------------------------------------


def _box(drawing: Svg, drawings: list[Svg]) -> str:
    if drawing.data is not None:
        drawing.data["id"] = f"chart{len(drawings)}"
        drawings.append(drawing)
        return f"<div class='box' id='{drawing.data['id']}'>{drawing.inline()}</div>"
    return f"<div class='box'>{drawing.inline()}</div>"


def _settings(run: RunRecord) -> str:
    facts = run.facts
    if not facts:
        return "<p class='lead'>run.json is missing or damaged.</p>"
    versions = ", ".join(f"{name} {v}" for name, v in facts.get("versions", {}).items())
    machine = ", ".join(f"{name} {v}" for name, v in facts.get("machine", {}).items())
    starts = [
        [*map(start.get, ("step", "time", "host")), ", ".join(start.get("changed") or []) or "-"]
        for start in facts.get("starts", [])
    ]
    columns = [("started at step", "n"), ("time", ""), ("host", ""), ("changed", "")]
    blocks = "".join(
        f"<details><summary>{name}</summary><pre>{escape(json.dumps(facts[key], indent=1))}</pre>"
        "</details>"
        for name, key in (
            ("DeepSpeed config", "config"),
            ("arguments", "arguments"),
            ("model", "model"),
            ("data", "data"),
            ("layout", "layout"),
        )
        if key in facts
    )
    grids = "\n\n".join("\n".join(grid) for grid in facts.get("schedules", []))
    tables = "\n\n".join("\n".join(tables) for tables in facts.get("routes", []))
    drawn = f"<pre>{escape(tables)}\n\n{escape(grids)}</pre>"
    shown = f"<details><summary>routes and schedules</summary>{drawn}</details>"
    return (
        f"{table(columns, starts)}<div class='box'><p>{escape(versions)}<br>{escape(machine)}</p>"
        f"{blocks}{shown}</div>"
    )


# --- several runs ---------------------------------------------------------------------------------


def _several(runs: Sequence[RunRecord], drawings: list[Svg]) -> str:
    def compared(title: str, curves: list[list[Curve]], x: str, y: str, **more: Any) -> str:
        flat = [curve for one in curves for curve in one]
        return _box(chart(title, flat, x, y, **more), drawings)

    def losses(run: RunRecord, n: int, x: str) -> list[Curve]:
        color = color_of(n, len(runs))
        dots, steps = (
            [(row[x], row["loss"]) for row in of_full_model(rows)]
            for rows in (run.validation, run.train)
        )
        train = Curve("" if dots else run.name, color, thinned(steps))
        return [train, Curve(run.name, color, dots, dots=True)]

    def steady(run: RunRecord, n: int, points: Points) -> list[Curve]:
        return [Curve(run.name, color_of(n, len(runs)), thinned(points))]

    boxes = []
    for x, words in (("tokens", "tokens"), ("seconds", "seconds of training")):
        curves = [losses(run, n, x) for n, run in enumerate(runs)]
        high = without_start([curve for one in curves for curve in one])
        title = f"Loss of the full model against {words}: training thin, validation with dots"
        boxes.append(
            compared(title, curves, words, "nats per token", y_range=(None, high), size=(1140, 340))
        )
    pace = [steady(run, n, run.pace) for n, run in enumerate(runs)]
    idle = [steady(run, n, _mean_idle(run)) for n, run in enumerate(runs)]
    size = (560.0, 260.0)
    boxes.append(
        "<div class='pair'>"
        + compared("Tokens per second", pace, "step", "", y_range=(0.0, None), size=size)
        + compared(
            "Idle share, mean of the stages",
            idle,
            "step",
            "",
            y_range=(0.0, 1.0),
            percent=True,
            size=size,
        )
        + "</div>"
    )
    return f"<h1>{len(runs)} runs</h1>{_overview(runs)}{''.join(boxes)}{_what_differs(runs)}"


def _mean_idle(run: RunRecord) -> Points:
    by_step: dict[float, list[float]] = {}
    for stage in run.stages:
        for x, y in run.points("train", stage, "idle_share", per="stage"):
            by_step.setdefault(x, []).append(y or 0.0)
    return [(x, sum(values) / len(values)) for x, values in sorted(by_step.items())]


def _overview(runs: Sequence[RunRecord]) -> str:
    rows = []
    for run in runs:
        pace = median([y for _, y in run.pace if y is not None] or [0.0])
        idle = [share for s in run.stages_now if (share := run.mean("idle_share", s)) is not None]
        loss = run.final_loss
        scheme = ", then ".join(dict.fromkeys(name for *_, name in run.phases)) or "-"
        rows.append(
            [
                run.name,
                scheme,
                f"{run.last_step:,}",
                "-" if loss is None else f"{loss:.4f}",
                f"{pace:,.0f}",
                f"{sum(idle) / len(idle):.1%}" if idle else "-",
                len(run.events),
            ]
        )
    numbers = ("steps", "last validation loss", "tokens/s", "idle", "not finite")
    return table([("run", ""), ("scheme", ""), *((name, "n") for name in numbers)], rows)


def _what_differs(runs: Sequence[RunRecord]) -> str:
    rows: list[list[str]] = []
    for part in ("config", "model", "data", "layout", "versions"):
        told = [flat(run.facts.get(part, {})) for run in runs]
        for name in dict.fromkeys(name for one in told for name in one):
            values = [json.dumps(one[name]) if name in one else "-" for one in told]
            rows += [[name, *values]] if len(set(values)) > 1 else []
    if not rows:
        return "<h2>Settings</h2><p class='lead'>The same in all runs.</p>"
    columns = [(head, "") for head in ("setting", *(run.name for run in runs))]
    return f"<h2>Settings that differ</h2>{table(columns, rows)}"
