"""What a run's files say, field by field: metrics.jsonl and run.json.

The reference is written from here; the tests hold every row that a run writes against it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TRAIN, VALIDATION, DIAGNOSTICS = "train", "validation", "diagnostics"
SAMPLE, EVENT = "sample", "event"
SPLITS = {
    TRAIN: "a step of training, at the reporting interval (`steps_per_print`)",
    VALIDATION: "a validation",
    DIAGNOSTICS: 'what `"diagnostics": true` measures at a validation',
    SAMPLE: "what the model wrote after a validation (`--sample-tokens`); last segment only",
    EVENT: "what was not finite, when that ends the run",
}


class Field(NamedTuple):
    """One field of a row of metrics.jsonl."""

    splits: tuple[str, ...]  # of the rows that have it
    unit: str
    meaning: str
    kind: str = "number"  # of its value, see `_FITS`


_ALL = tuple(SPLITS)
_TOLD = (TRAIN, EVENT)
METRICS = {
    "step": Field(
        _ALL, "", "optimizer steps done; of an event, the step in which it arose", "count"
    ),
    "segment": Field(_ALL, "", "which segment, from 0", "count"),
    "stage": Field(_ALL, "", "which stage holds it", "count"),
    "split": Field(_ALL, "", "the kind of row, as above", "name"),
    "loss": Field(
        _ALL,
        "nats a token",
        "mean over micro-batches and replicas, of training before the update; null: none, or not "
        "finite. With `head.vocabulary` and no `rare_samples` over the classes of the head, in "
        "all but the last segment",
    ),
    "has_loss": Field((TRAIN,), "", "false where the routes give the segment no loss", "flag"),
    "router_loss": Field(
        (TRAIN,),
        "",
        "what the segment's experts add to its loss, before `router_aux_loss_coef`; only of models "
        "with experts",
    ),
    "tokens": Field(_ALL, "tokens", "tokens trained on by then, all replicas together", "count"),
    "seconds": Field(
        _ALL,
        "s",
        "time trained by then, without validations, saves and the first step of a start",
        "time",
    ),
    "nonfinite": Field(
        _ALL,
        "",
        "what was not finite since the row before: `batch`, `activation`, `loss`, `gradient`, "
        "`from_below`, `from_above`; in other rows the fields it befell",
        "text",
    ),
    "nonfinite_step": Field(_TOLD, "", "in which step"),
    "skipped": Field(_TOLD, "steps", "steps left out by the stage so far"),
    "grad_norm": Field(
        (TRAIN,), "", "norm of the gradient before clipping; null where nobody needs to know it"
    ),
    "lr": Field((TRAIN,), "", "learning rate that the step was taken with"),
    "idle_share": Field(
        (TRAIN,), "share", "share of the step that the stage waited, for neighbours or replicas"
    ),
    "step_seconds": Field((TRAIN,), "s", "length of the step on the stage"),
    "tokens_per_second": Field(
        (TRAIN,), "tokens/s", "speed of the step on its slowest stage, all replicas together"
    ),
    "device_tokens_per_second": Field(
        (TRAIN,), "tokens/s", "the same, divided by the number of ranks"
    ),
    "mfu": Field(
        (TRAIN,),
        "share",
        "share of the devices' peak in bf16 that the step's model operations use, heads not "
        "counted; null on CPUs and on devices of which the peak is not known",
    ),
    "sent_bytes": Field((TRAIN,), "bytes", "sent to neighbouring stages in the step"),
    "exchanged_bytes": Field(
        (TRAIN,), "bytes", "sent to other replicas of the stage; null where DeepSpeed averages"
    ),
    "slowest_link": Field(
        (TRAIN,), "", "the link that the stage waited for longest; null: none", "text"
    ),
    "prompt": Field((SAMPLE,), "", "the beginning of a validation sequence", "text"),
    "text": Field((SAMPLE,), "", "how the model went on", "text"),
    "memory_bytes": Field(
        (TRAIN, VALIDATION),
        "bytes",
        "most that a rank of the stage has held so far, of the process on a CPU; in train rows "
        "that of the first replica",
    ),
    "gradient_cosine": Field(
        (DIAGNOSTICS,),
        "",
        "cosine between the gradient of the segment's losses and that of backpropagation",
    ),
    "activation_norm": Field(
        (DIAGNOSTICS,), "", "mean norm of a position's hidden state at the segment's end"
    ),
    "activation_rank": Field((DIAGNOSTICS,), "", "effective rank of these hidden states"),
}
_MOST = 2**63
_FITS = {  # a number that is not finite is null, and was NaN in older files
    "count": lambda value: type(value) is int and 0 <= value < _MOST,
    "number": lambda value: (
        value is None or type(value) is float or (type(value) is int and abs(value) < _MOST)
    ),
    "time": lambda value: type(value) in (int, float) and 0 <= value < _MOST,
    "text": lambda value: value is None or isinstance(value, str),
    "name": lambda value: isinstance(value, str),
    "flag": lambda value: isinstance(value, bool),
}
_ALWAYS = ("step", "segment", "stage", "split", "loss", "tokens", "seconds")


def is_row(row: Any) -> bool:
    """Can a run have written this into metrics.jsonl? Fields and splits of a newer version may be
    there too."""
    if not isinstance(row, dict) or not row.keys() >= {*_ALWAYS}:
        return False
    known = all(_FITS[METRICS[name].kind](value) for name, value in row.items() if name in METRICS)
    return known and row["step"] >= (row["split"] == TRAIN)  # one is of a step that was taken


RUN = {
    "arguments": "the command line",
    "config": "ds_config.json, checked, with what the command line changed",
    "model": "the model's config in Hugging Face's form",
    "weights": "what the run's first weights came from; null: drawn afresh",
    "data": "`folder`, and what its prepared.json says (`fingerprint`, `seq_len`, tokens)",
    "layout": "`stages`, `replicas`, `segments`, `segment_parts` (first layer of each segment), "
    "`parameters` and `head_parameters` (by stage), `predicted_idle` (share of each stage, by "
    "phase), `auxiliary_flops` (share of heads in the work, by stage), `hosts`",
    "routes": "the route tables of the schedules, as text",
    "schedules": "the schedule of a step, as a grid of ticks; several where phases or chunks "
    "change it",
    "machine": "`processor`, `cpus`, `device`",
    "versions": "of ds_local, torch, deepspeed, transformers, datasets, python",
    "starts": "every start: `step`, `time`, `host`, `pid`, `checkpoint`, `weights`, `changed` "
    "(kinds that `--allow-change` let pass), and arguments, config, data, versions, machine of "
    "then; `unit`, where units were gathered",
    "gathered": "`step` and `runs` of units that `ds-local gather` made this of; gone once a job "
    "goes on from it",
}
