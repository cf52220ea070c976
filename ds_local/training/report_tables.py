"""The tables of a run's report."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement

from ds_local.charts.pages import table
from ds_local.charts.plots import number
from ds_local.training.run_record import RunRecord

_LISTED = 50  # events
_SAMPLES = 6
_GIB = 2**30


def waits_table(run: RunRecord) -> str:
    rows = []
    for stage in run.stages_now:
        share, sent = run.mean("idle_share", stage), run.mean("sent_bytes", stage)
        links = "; ".join(f"{link} ({part:.0%})" for link, part in run.waits(stage).items())
        idle = "-" if share is None else f"{share:.1%}"
        rows.append(
            [stage, idle, "-" if sent is None else number(float(f"{sent:.3g}")), links or "-"]
        )
    waits = "waits longest for (share of the reports)"
    return table([("stage", ""), ("idle", "n"), ("bytes sent a step", "n"), (waits, "")], rows)


def samples_table(run: RunRecord) -> str:
    """The newest ones, the newest first."""
    rows = []
    for row in run.samples[: -_SAMPLES - 1 : -1]:
        text = Element("pre")
        text.text = str(row.get("prompt"))
        SubElement(text, "b").text = str(row.get("text"))
        rows.append([f"{row['step']:,}", text])
    told = "beginning of a validation sequence, and in bold how the model goes on"
    return table([("step", "n"), (told, "")], rows)


def memory_table(run: RunRecord) -> str:
    live = None
    if run.plan is not None:
        live = run.plan.schedule_at(max(run.last_step - 1, 0)).peak_live
    rows = [
        [
            stage,
            f"{run.memory[stage] / _GIB:.2f}" if stage in run.memory else "-",
            live[stage] if live else "-",
        ]
        for stage in run.stages_now
    ]
    held, alive = "most held by a rank, GiB", "live micro-batches, at most"
    return (
        table([("stage", ""), (held, "n"), (alive, "n")], rows)
        + "<p class='lead'>Measured at validations: of a GPU what torch held, else of the process."
        "</p>"
    )


def events_table(run: RunRecord) -> str:
    if not run.events:
        return "<p class='lead'>Every loss and gradient was finite.</p>"
    fields = ("nonfinite_step", "segment", "stage", "nonfinite", "skipped")
    heads = ("step", "segment", "stage", "what", "steps left out so far")
    rows = [[row.get(field, "-") for field in fields] for row in run.events[-_LISTED:]]
    return table([*zip(heads, ("n", "n", "n", "bad", "n"), strict=True)], rows)
