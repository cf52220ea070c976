"""The schemes by name: one table for planner, study, benchmark and every page.

A name is made of the mode, its window and its options (`name_of`). A mix may give the share of a
step's micro-batches that follow a row; `section_of` makes a number of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from ds_local.config.scheme import DEFAULT_WINDOW, WINDOWED
from ds_local.errors import ConfigError

Section = dict[str, Any]  # keys of "local_parallel"


class NamedScheme(NamedTuple):
    """What to write into the config, and what it does."""

    section: Section
    sentence: str


BACKPROP, LOCAL = {"mode": "backprop"}, {"mode": "local"}
CHUNKED = {"mode": "chunked", "window": 2}
AHEAD = BACKPROP | {"run_ahead": "auto"}


def mixed(share: float, rest: Section = LOCAL, **more: Any) -> Section:
    """A share of each step's micro-batches runs backpropagation, the others follow `rest`."""
    return {"mix": [{"mode": "backprop", "share": share}, rest], **more}


SCHEMES: dict[str, NamedScheme] = {
    "data parallel": NamedScheme(
        BACKPROP, "No pipeline: one stage, whole models side by side, gradients averaged."
    ),
    "backprop": NamedScheme(BACKPROP, "The last loss trains everything, scheduled as 1F1B."),
    "backprop, split 1": NamedScheme(
        BACKPROP | {"split_backward": 1},
        "The same gradients, weight gradients deferred: zero bubble in 1F1B's memory (ZB-H1).",
    ),
    "backprop, split 2": NamedScheme(
        BACKPROP | {"split_backward": 2},
        "The same gradients, deferred further: no bubble, in up to twice 1F1B's memory (ZB-H2).",
    ),
    "backprop, run ahead": NamedScheme(
        AHEAD, "Forwards of the next step begin before the update: no bubble, older weights."
    ),
    "backprop, run ahead, predicted": NamedScheme(
        AHEAD | {"predict_weights": True},
        "Run-ahead on weights to which the last update is added once more for each to come.",
    ),
    "backprop, run ahead, rates discounted": NamedScheme(
        AHEAD | {"delay_discount": 0.5},
        "Run-ahead with a smaller learning rate where gradients are older.",
    ),
    "backprop, run ahead, at most one": NamedScheme(
        AHEAD | {"run_ahead": 1}, "Run-ahead of one forward: less delay, some waiting."
    ),
    "interlocking 2": NamedScheme(
        {"mode": "interlocking", "window": 2}, "The next segment's loss, and no other."
    ),
    "interlocking 3": NamedScheme(
        {"mode": "interlocking", "window": 3}, "The loss two segments ahead, and no other."
    ),
    "overlapping 2": NamedScheme(
        {"mode": "overlapping", "window": 2}, "A segment's own loss and the next one's, summed."
    ),
    "deep supervision": NamedScheme(
        {"mode": "deep_supervision"}, "Every loss trains every segment below it."
    ),
    "chunked 2": NamedScheme(
        CHUNKED, "Backpropagation inside pairs of segments, one loss for each pair."
    ),
    "chunked 2, split 1": NamedScheme(
        CHUNKED | {"split_backward": 1}, "Pairs of segments, weight gradients deferred."
    ),
    "chunked 2, split 2": NamedScheme(
        CHUNKED | {"split_backward": 2},
        "Pairs of segments, weight gradients deferred until no bubble is left.",
    ),
    "chunked 2, run ahead": NamedScheme(
        CHUNKED | {"run_ahead": "auto"},
        "Pairs of segments, one forward of the next step before the update: no bubble.",
    ),
    "shifted chunks 2": NamedScheme(
        {"mode": "shifted_chunked", "window": 2},
        "Pairs of segments that move by one segment at every step.",
    ),
    "chunked 2, a quarter backprop": NamedScheme(
        mixed(1 / 4, CHUNKED), "A quarter of the micro-batches backpropagation, the rest pairs."
    ),
    "chunked 2, half corrected": NamedScheme(
        mixed(1 / 2, CHUNKED, correction=1.0),
        "Half backpropagation, half pairs, the mean gradient of a step corrected to the true one.",
    ),
    "mixed 1/8": NamedScheme(
        mixed(1 / 8), "One micro-batch in eight backpropagation, the rest local."
    ),
    "mixed 1/2": NamedScheme(
        mixed(1 / 2), "Every second micro-batch backpropagation, the rest local."
    ),
    "mixed 1/4": NamedScheme(
        mixed(1 / 4), "One micro-batch in four backpropagation, the rest local."
    ),
    "mixed 1/2, corrected": NamedScheme(
        mixed(1 / 2, correction=1.0),
        "Half backpropagation, half local, the mean gradient of a step corrected to the true one.",
    ),
    "mixed auto": NamedScheme(
        {"mix": [BACKPROP | {"micro_batches": "auto"}, LOCAL]},
        "As many micro-batches of backpropagation as the pipeline hides, the rest local.",
    ),
    "local": NamedScheme(LOCAL, "A segment's own loss, nothing flows back."),
    "local, one backprop step in 8": NamedScheme(
        {"phases": [LOCAL | {"until_step": 7}, BACKPROP], "cycle_steps": 8},
        "Seven local steps, then one of backpropagation.",
    ),
}

_WORDS = {"shifted_chunked": "shifted chunks", "deep_supervision": "deep supervision"}


def name_of(section: Mapping[str, Any]) -> str:
    """The name of a section that is one row: `{"mode": "chunked", "split_backward": 2}` ->
    "chunked 2, split 2"."""
    mode = section.get("mode", "local")
    name = _WORDS.get(mode, mode)
    if mode in WINDOWED:
        name += f" {section.get('window') or DEFAULT_WINDOW}"
    if section.get("combine", "sum") != "sum":
        name += f", {section['combine']}"
    if section.get("split_backward"):
        name += f", split {section['split_backward']}"
    if section.get("run_ahead"):
        name += ", run ahead"
    return name


def section_of(section: Mapping[str, Any], micro_batches: int) -> Section:
    """A section with the shares of a mix as numbers of so many micro-batches, 1 at least."""
    made: Section = copy.deepcopy(dict(section))
    for entry in made.get("mix", ()):
        if "share" in entry:
            entry["micro_batches"] = max(1, int(entry.pop("share") * micro_batches))
    return made


def fewest_micro_batches(section: Mapping[str, Any]) -> int:
    """Of a step in which a mix has the shares that it asks for."""
    shares = [entry["share"] for entry in section.get("mix", ()) if "share" in entry]
    return round(1 / min(shares)) if shares else 1


def head_of(head: Mapping[str, Any], vocab_size: int) -> Section:
    """A "head" section in which "vocabulary" and "rare_samples" may be shares of a model's tokens:
    as numbers."""
    shares = [key for key in ("vocabulary", "rare_samples") if isinstance(head.get(key), float)]
    return {**head, **{key: max(1, round(head[key] * vocab_size)) for key in shares}}


def dropped_losses(num_segments: int, steps: int, by: float = 0.5) -> list[Section]:
    """The "phases" of deep supervision whose auxiliary losses are dropped one by one, the lowest
    first, until plain backpropagation is left.

    Of K segments loss l, counted from 1, trains all segments below it until l / K of the first `by`
    of the steps is over: at the default l / 2K of the run, as Al-Rfou et al. 2019 (arXiv
    1808.04444) drop theirs.

    Args:
        steps: of the whole run.
        by: the share of them after which the last loss alone would be left.

    Raises:
        ConfigError: when there are too few steps to drop the losses one by one.
    """
    ends = [round(steps * by * loss / num_segments) for loss in range(1, num_segments)]
    if not 0 < by <= 1 or any(b <= a for a, b in pairwise([0, *ends])):
        raise ConfigError(
            f"{steps} steps of which {by:g} see auxiliary losses are too few to drop "
            f"{num_segments - 1} of them one by one; take more steps, by up to 1, or fewer segments"
        )
    kept = ([0.0] * gone + [1.0] * (num_segments - gone) for gone in range(num_segments))
    phases = zip(ends, kept, strict=False)
    return [
        *({"mode": "deep_supervision", "weights": w, "until_step": end} for end, w in phases),
        BACKPROP,
    ]


_IN_WORDS = {
    "backprop": "the last loss trains everything",
    "local": "a segment learns from its own loss alone, nothing flows back",
    "chunked": "backpropagation inside {window} segments, one loss for each such chunk",
    "shifted_chunked": "backpropagation inside {window} segments, cut elsewhere in every step",
    "overlapping": "a segment learns from its own loss and those of the next {more}",
    "interlocking": "a segment learns from the loss {more} ahead, and no other",
    "deep_supervision": "every loss trains every segment below it",
}


def in_words(scheme: Mapping[str, Any], name: str) -> str:
    """A scheme for people who do not know its name.

    Args:
        scheme: keys of a scheme: a row, or a "mix" of rows.
        name: of its schedule.
    """
    rows = scheme.get("mix") or [scheme]
    told = dict.fromkeys(_row_in_words(row) for row in rows)
    return f"{name}: {'; '.join(told)}"


def _row_in_words(row: Mapping[str, Any]) -> str:
    window = row.get("window") or DEFAULT_WINDOW
    return _IN_WORDS[row.get("mode") or "local"].format(window=window, more=window - 1)
