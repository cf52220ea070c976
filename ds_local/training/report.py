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

from ds_local.charts.pages import page
from ds_local.charts.plots import Curve, Mark, bars, chart, number
from ds_local.charts.style import color_of
from ds_local.charts.svg import Svg, text_width
from ds_local.charts.timelines import draw_bands
from ds_local.outputs import write_file
from ds_local.training.run_record import Points, RunRecord, differences, thinned

_LISTED = 50  # events
_IDLE = 0.05  # share of a step that is not worth a word
_GIB = 2**30


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
        box(_losses(run)),
        f"<div class='pair'>{box(_rates(run))}{box(_norms(run))}</div>",
        "<h2>Time</h2>",
        f"<div class='pair'>{box(_pace(run))}{box(_idle(run))}</div>",
        box(_step_time(run)),
        box(_link_waits(run)),
        _waits(run),
    ]
    step = run.step_picture()
    if step is not None:
        band, unit, how = step
        lanes = draw_bands([band], "the schedule of one step", unit=unit)
        parts += ["<h2>One step</h2>", box(lanes), f"<p class='lead'>{escape(how)}</p>"]
    parts += ["<h2>Memory</h2>", _memory(run), "<h2>Not finite</h2>", _events(run)]
    return "".join([*parts, "<h2>Settings</h2>", _settings(run)])


def _lead(run: RunRecord) -> str:
    layout = run.facts.get("layout", {})
    words = [f"{run.last_step:,} steps, {run.tokens:,} tokens"]
    if layout:
        words.insert(0, f"{layout['stages']} stages x {layout['replicas']} replicas")
    if run.phases:
        words.insert(0, ", then ".join(dict.fromkeys(name for *_, name in run.phases)))
    asked = run.facts.get("arguments", {}).get("max_steps")
    if asked and run.last_step < asked:
        words.append(f"of {asked:,} steps so far")
    return " \u00b7 ".join(words)


def what_next(run: RunRecord) -> list[str]:
    """Sentences on what deserves a look, the most urgent first."""
    found = []
    if run.events:
        first = min(run.events, key=lambda row: row["nonfinite_step"])
        found.append(
            f"Numbers were not finite, {len(run.events)} times in the reports, first at step "
            f"{first['nonfinite_step']}: {first['nonfinite']} of segment {first['segment']}, stage "
            f"{first['stage']}. Look at the gradient norm and the learning rate just before."
        )
    last = max(run.segments)
    losses = [(r["step"], r["loss"]) for r in run.validation if r["segment"] == last and r["loss"]]
    if len(losses) > 1:
        step, best = min(losses, key=lambda point: point[1])
        if losses[-1][1] > best * 1.01:
            found.append(
                f"The validation loss of the full model was best at step {step} ({best:.4f}) and "
                f"is {losses[-1][1]:.4f} now: it overfits, or the learning rate is too high."
            )
    found += _on_norms(run)
    found += _on_idle(run)
    if run.costs is None:
        found.append(
            "train.py --profile measures what each stage's work takes; this page then shows a step "
            "as executed, and simulate.py --profile what another schedule would take."
        )
    return found


def _on_norms(run: RunRecord) -> list[str]:
    found = []
    for segment in run.segments:
        values = [y for _, y in run.points("train", segment, "grad_norm")[1:] if y is not None]
        if len(values) > 10 and max(values[len(values) // 10 :]) > 10 * median(values):
            found.append(
                f"The gradient norm of segment {segment} had a peak of {max(values):.3g}, "
                f"{max(values) / median(values):.0f} times its median: lower the learning rate, or "
                "gradient_clipping."
            )
    return found


def _on_idle(run: RunRecord) -> list[str]:
    """The idlest stage, and why."""
    shares = {stage: run.mean("idle_share", stage) for stage in run.stages}
    known = {stage: share for stage, share in shares.items() if share is not None}
    if not known:
        return []
    idlest = max(known, key=lambda stage: known[stage])
    busiest = min(known, key=lambda stage: known[stage])
    share = known[idlest]
    if share < _IDLE:
        return [f"No stage waits much: the idlest, stage {idlest}, {share:.1%} of its time."]
    text = f"Stage {idlest} is the idlest: it waits {share:.0%} of its time"
    waits = run.waits(idlest)
    link = next(iter(waits), None)
    text += f", mostly for the {link}." if link else "."
    expected = run.expected_idle
    explained = expected is not None and expected[idlest] >= 0.7 * share
    if explained and expected is not None:
        text += (
            f" The schedule alone explains {expected[idlest]:.0%}: more micro-batches a step, "
            "split_backward, or a scheme with fewer gradient messages would shorten it."
        )
    elif known[busiest] < share / 2:
        text += (
            f" Stage {busiest} waits least ({known[busiest]:.0%}), so it has the most work: give "
            "it fewer layers (partition with a profile, or parts) or a cheaper head."
        )
    else:
        text += " All stages wait alike: the links are slow, or the machine is shared."
    return [text]


# --- its charts -----------------------------------------------------------------------------------


def _box(drawing: Svg, drawings: list[Svg]) -> str:
    if drawing.data is not None:
        drawing.data["id"] = f"chart{len(drawings)}"
        drawings.append(drawing)
        return f"<div class='box' id='{drawing.data['id']}'>{drawing.inline()}</div>"
    return f"<div class='box'>{drawing.inline()}</div>"


def _by_segment(run: RunRecord, name: str) -> list[Curve]:
    count = max(run.segments) + 1
    return [
        Curve(f"segment {s}", color_of(s, count), thinned(run.points("train", s, name)))
        for s in run.segments
    ]


def _by_stage(run: RunRecord, name: str) -> list[Curve]:
    count = max(run.stages, default=0) + 1
    return [
        Curve(f"stage {s}", color_of(s, count), thinned(run.points("train", s, name, per="stage")))
        for s in run.stages
    ]


def _losses(run: RunRecord) -> Svg:
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
        y_range=(None, _without_start(curves)),
        shades=run.phases,
    )


def _without_start(curves: Sequence[Curve]) -> float | None:
    """An upper end of the y axis that leaves out the fall in the first twentieth of the run."""
    values = [
        y
        for curve in curves
        for x, y in curve.points
        if y is not None and x > 0.05 * max(x for x, _ in curve.points)
    ]
    return max(values) * 1.02 if values else None


def _rates(run: RunRecord) -> Svg:
    curves = _by_segment(run, "lr")
    if len({tuple(c.points) for c in curves}) == 1:
        curves = [curves[0]._replace(name="all segments")]
    return chart("Learning rate", curves, "step", "", y_range=(0.0, None), size=(560, 260))


def _norms(run: RunRecord) -> Svg:
    curves = _by_segment(run, "grad_norm")
    high = _without_start(curves)
    title = "Gradient norm before clipping"
    return chart(title, curves, "step", "", y_range=(0.0, high), size=(560, 260))


def _pace(run: RunRecord) -> Svg:
    points = thinned(run.pace)
    middle = median([y for _, y in points if y is not None] or [0.0])
    title = f"Tokens per second: {middle:,.0f} in the median"
    curve = Curve("", color_of(0, 1), points)
    return chart(
        title, [curve], "step", "pace of the slowest stage", y_range=(0.0, None), size=(560, 260)
    )


def _idle(run: RunRecord) -> Svg:
    curves = _by_stage(run, "idle_share")
    return chart(
        "Idle share of every stage",
        curves,
        "step",
        "",
        y_range=(0.0, 1.0),
        percent=True,
        size=(560, 260),
    )


def _step_time(run: RunRecord) -> Svg:
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


def _link_waits(run: RunRecord) -> Svg:
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


def _waits(run: RunRecord) -> str:
    rows = []
    for stage in run.stages:
        share = run.mean("idle_share", stage)
        links = "; ".join(f"{escape(link)} ({part:.0%})" for link, part in run.waits(stage).items())
        sent = run.mean("sent_bytes", stage)
        cells = (
            f"<td>{stage}</td><td class=n>{'-' if share is None else f'{share:.1%}'}</td>"
            f"<td class=n>{'-' if sent is None else number(float(f'{sent:.3g}'))}</td>"
            f"<td>{links or '-'}</td>"
        )
        rows.append(f"<tr>{cells}</tr>")
    return (
        "<div class='box'><table><tr><th>stage</th><th class=n>idle</th><th class=n>bytes sent a "
        "step</th><th>waits longest for (share of the reports)</th></tr>"
        + "".join(rows)
        + "</table></div>"
    )


def _memory(run: RunRecord) -> str:
    live = None
    if run.plan is not None:
        live = run.plan.schedule_at(max(run.last_step - 1, 0)).peak_live
    rows = "".join(
        f"<tr><td>{stage}</td><td class=n>"
        + (f"{run.memory[stage] / _GIB:.2f}" if stage in run.memory else "-")
        + f"</td><td class=n>{live[stage] if live else '-'}</td></tr>"
        for stage in run.stages
    )
    return (
        "<div class='box'><table><tr><th>stage</th><th class=n>most held by a rank, GiB</th>"
        f"<th class=n>live micro-batches, at most</th></tr>{rows}</table></div>"
        "<p class='lead'>Measured at validations: of a GPU what torch held, else of the process."
        "</p>"
    )


def _events(run: RunRecord) -> str:
    if not run.events:
        return "<p class='lead'>Every loss and gradient was finite.</p>"
    rows = "".join(
        f"<tr><td class=n>{row['nonfinite_step']}</td><td class=n>{row['segment']}</td>"
        f"<td class=n>{row['stage']}</td><td class=bad>{escape(str(row['nonfinite']))}</td>"
        f"<td class=n>{row.get('skipped', '-')}</td></tr>"
        for row in run.events[-_LISTED:]
    )
    return (
        "<div class='box'><table><tr><th class=n>step</th><th class=n>segment</th>"
        "<th class=n>stage</th><th>what</th><th class=n>steps left out so far</th></tr>"
        f"{rows}</table></div>"
    )


def _settings(run: RunRecord) -> str:
    facts = run.facts
    if not facts:
        return "<p class='lead'>run.json is missing or damaged.</p>"
    versions = ", ".join(f"{name} {v}" for name, v in facts.get("versions", {}).items())
    machine = ", ".join(f"{name} {v}" for name, v in facts.get("machine", {}).items())
    starts = "".join(
        f"<tr><td class=n>{start.get('step')}</td><td>{escape(str(start.get('time')))}</td>"
        f"<td>{escape(str(start.get('host')))}</td>"
        f"<td>{escape(', '.join(start.get('changed') or []) or '-')}</td></tr>"
        for start in facts.get("starts", [])
    )
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
        f"<div class='box'><p>{escape(versions)}<br>{escape(machine)}</p><table><tr>"
        "<th class=n>started at step</th><th>time</th><th>host</th><th>changed</th></tr>"
        f"{starts}</table>{blocks}{shown}</div>"
    )


# --- several runs ---------------------------------------------------------------------------------


def _several(runs: Sequence[RunRecord], drawings: list[Svg]) -> str:
    def compared(title: str, curves: list[list[Curve]], x: str, y: str, **more: Any) -> str:
        flat = [curve for one in curves for curve in one]
        return _box(chart(title, flat, x, y, **more), drawings)

    def losses(run: RunRecord, n: int, x: str) -> list[Curve]:
        color, last = color_of(n, len(runs)), max(run.segments)
        dots = run.points("validation", last, "loss", x)
        train = Curve(
            "" if dots else run.name, color, thinned(run.points("train", last, "loss", x))
        )
        return [train, Curve(run.name, color, dots, dots=True)]

    def steady(run: RunRecord, n: int, points: Points) -> list[Curve]:
        return [Curve(run.name, color_of(n, len(runs)), thinned(points))]

    boxes = []
    for x, words in (("tokens", "tokens"), ("seconds", "seconds of training")):
        curves = [losses(run, n, x) for n, run in enumerate(runs)]
        high = _without_start([curve for one in curves for curve in one])
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
        idle = [share for s in run.stages if (share := run.mean("idle_share", s)) is not None]
        loss = run.final_loss
        scheme = ", then ".join(dict.fromkeys(name for *_, name in run.phases)) or "-"
        rows.append(
            f"<tr><td>{escape(run.name)}</td><td>{escape(scheme)}</td><td class=n>{run.last_step:,}"
            f"</td><td class=n>{'-' if loss is None else f'{loss:.4f}'}</td><td class=n>{pace:,.0f}"
            f"</td><td class=n>{f'{sum(idle) / len(idle):.1%}' if idle else '-'}</td>"
            f"<td class=n>{len(run.events)}</td></tr>"
        )
    return (
        "<div class='box'><table><tr><th>run</th><th>scheme</th><th class=n>steps</th>"
        "<th class=n>last validation loss</th><th class=n>tokens/s</th><th class=n>idle</th>"
        f"<th class=n>not finite</th></tr>{''.join(rows)}</table></div>"
    )


def _what_differs(runs: Sequence[RunRecord]) -> str:
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = [
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(one)}</td>' for one in values)}</tr>"
        for part in ("config", "model", "data", "layout", "versions")
        for name, values in differences(runs, part)
    ]
    if not rows:
        return "<h2>Settings</h2><p class='lead'>The same in all runs.</p>"
    return (
        "<h2>Settings that differ</h2><div class='box'><table><tr><th>setting</th>"
        f"{heads}</tr>{''.join(rows)}</table></div>"
    )
