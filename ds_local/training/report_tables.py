"""The tables of a run's report."""

from __future__ import annotations

from html import escape

from ds_local.charts.plots import number
from ds_local.training.run_record import RunRecord

_LISTED = 50  # events
_SAMPLES = 6
_GIB = 2**30


def waits_table(run: RunRecord) -> str:
    rows = []
    for stage in run.stages_now:
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


def samples_table(run: RunRecord) -> str:
    """The newest ones, the newest first."""
    rows = "".join(
        f"<tr><td class=n>{row['step']:,}</td><td><pre>{escape(str(row.get('prompt')))}"
        f"<b>{escape(str(row.get('text')))}</b></pre></td></tr>"
        for row in run.samples[: -_SAMPLES - 1 : -1]
    )
    return (
        "<div class='box'><table><tr><th class=n>step</th><th>beginning of a validation sequence, "
        f"and <b>how the model goes on</b></th></tr>{rows}</table></div>"
    )


def memory_table(run: RunRecord) -> str:
    live = None
    if run.plan is not None:
        live = run.plan.schedule_at(max(run.last_step - 1, 0)).peak_live
    rows = "".join(
        f"<tr><td>{stage}</td><td class=n>"
        + (f"{run.memory[stage] / _GIB:.2f}" if stage in run.memory else "-")
        + f"</td><td class=n>{live[stage] if live else '-'}</td></tr>"
        for stage in run.stages_now
    )
    return (
        "<div class='box'><table><tr><th>stage</th><th class=n>most held by a rank, GiB</th>"
        f"<th class=n>live micro-batches, at most</th></tr>{rows}</table></div>"
        "<p class='lead'>Measured at validations: of a GPU what torch held, else of the process."
        "</p>"
    )


def events_table(run: RunRecord) -> str:
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
