"""How many tokens a scheme needs to end where backpropagation does: the nearest measured row.

learning.json holds rows of the quality study (docs/quality.md, docs/quality-ratio.md) and, of
forwards that run ahead, those of docs/run-ahead.md; `scripts/generated_pages.py` writes it.
Gradients of data parallelism and of a split backward are those of backpropagation, so they need as
many tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).with_name("learning.json")
EXACT = ("data parallel", "backprop")
FULL: dict[str, Any] = {}  # the head that has no options


class Measured(NamedTuple):
    """A row of the study."""

    scheme: str
    head: dict[str, Any]  # options of "head"
    segments: int
    vocabulary_over_width: float
    seeds: int
    tokens: float | None  # in parts of backprop's; None: it ended above all of backprop's runs
    delay: float = 0.0  # of the oldest gradients, in steps
    tail: float = 0.0  # share of the steps, the last ones, that are backpropagation


@dataclass(frozen=True)
class Learning:
    """What a scheme's tokens are worth.

    Attributes:
        tokens: for a loss, in parts of those that backpropagation needs; None: not known.
        source: where that comes from, in words.
    """

    tokens: float | None = 1.0
    source: str = "gradients of backprop"

    @property
    def times(self) -> float:
        """`tokens`, as if they were as many as backpropagation's where nobody has measured it."""
        return self.tokens or 1.0


BACKPROPS = Learning()


def learning_of(
    name: str,
    head: Mapping[str, Any],
    stages: int,
    vocabulary_over_width: float,
    delay: float = 0.0,
    tail: float = 0.0,
) -> Learning:
    """Of a scheme (see docs/schemes.md) with these options of "head", whose oldest gradients are
    `delay` steps old, and which ends in backpropagation for a share `tail` of its steps.

    Of those with this tail and gradients no younger, the row nearest in delay is taken, then the
    one nearest in segments, then in vocabulary / width, then the one with the most seeds. A head
    that was not measured with the scheme is taken to cost as much as it cost local learning, and
    more segments with a tail what they cost without one.
    """
    scheme = name.partition(", split")[0]
    if scheme in EXACT:
        return BACKPROPS
    ratio, whole = vocabulary_over_width, _named(scheme, tail)
    base = _nearest(scheme, FULL, stages, ratio, delay, tail)
    if base is None or base.tokens is None:
        return Learning(None, _why_not(whole, base, delay))
    source, tokens = f"{whole} on {_where(base)}", base.tokens
    if tail and (further := _further(scheme, base.segments, stages, ratio)) != 1:
        tokens *= further
        source += f"; times {further:.2f} for more segments, as without the tail"
    if delay:
        source += f", gradients up to {base.delay:.2f} steps old, here {delay:.2f}"
    if not head:
        return Learning(tokens, source)
    of, end = scheme, tail
    with_head = _nearest(of, head, stages, ratio, tail=end)
    if with_head is None:
        of, end = "local", 0.0
        with_head = _nearest(of, head, stages, ratio)
    if with_head is None or with_head.tokens is None:
        return Learning(None, _why_not(f"{_named(of, end)} with this head", with_head))
    full = _nearest(of, FULL, with_head.segments, with_head.vocabulary_over_width, tail=end)
    if full is None or full.tokens is None:
        return Learning(None, _why_not(f"{_named(of, end)} with a full head", full))
    more = with_head.tokens / full.tokens
    cost = f"times {more:.2f} for the head, of {_named(of, end)} on {_where(with_head)}"
    return Learning(tokens * more, f"{source}; {cost}")


def _further(scheme: str, measured_on: int, stages: int, vocabulary_over_width: float) -> float:
    """How many times the tokens the scheme needs on `stages` segments, if they are more than it was
    measured on; 1 for fewer."""
    there = _nearest(scheme, FULL, stages, vocabulary_over_width)
    if there is None or there.tokens is None:
        return 1.0
    here = _nearest(scheme, FULL, measured_on, there.vocabulary_over_width)
    return 1.0 if here is None or here.tokens is None else max(1.0, there.tokens / here.tokens)


def _named(scheme: str, tail: float) -> str:
    return f"{scheme} with a tail of {tail:.0%}" if tail else scheme


def _nearest(
    scheme: str,
    head: Mapping[str, Any],
    segments: int,
    vocabulary_over_width: float,
    delay: float = 0.0,
    tail: float = 0.0,
) -> Measured | None:
    """The row that is known, if there is one; else one that is not, if there is one."""

    def distance(one: Measured) -> tuple[float, float, float, int]:
        return (
            one.delay,
            abs(math.log(one.segments / segments)),
            abs(math.log(one.vocabulary_over_width / vocabulary_over_width)),
            -one.seeds,
        )

    found = [
        one
        for one in measured()
        if (one.scheme, one.head, one.tail) == (scheme, head, tail) and one.delay >= delay - 1e-9
    ]
    known = [one for one in found if one.tokens is not None]
    return min(known or found, key=distance, default=None)


def _where(row: Measured) -> str:
    seeds = f"{row.seeds} seed{'s' if row.seeds > 1 else ''}"
    return f"{row.segments} segments (vocabulary / width {row.vocabulary_over_width:g}, {seeds})"


def _why_not(what: str, found: Measured | None, delay: float = 0.0) -> str:
    if delay:
        what += f" with gradients {delay:.2f} steps old"
    return f"{what}: {'ended above every run of backprop' if found else 'not measured'}"


@cache
def measured() -> tuple[Measured, ...]:
    return tuple(Measured(**row) for row in json.loads(DATA.read_text()))


def ratios() -> tuple[float, float]:
    """The lowest and the highest vocabulary / width among rows that are known."""
    found = [row.vocabulary_over_width for row in measured() if row.tokens is not None]
    return min(found), max(found)


def outside(vocabulary_over_width: float) -> str:
    """A warning where a model's heads are dearer or cheaper than any that was measured; ""
    elsewhere."""
    low, high = ratios()
    if low / 2 <= vocabulary_over_width <= high * 2:
        return ""
    known = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return (
        f"vocabulary / width is {vocabulary_over_width:.0f} here, and what schemes need in tokens "
        f"was measured at {known}: read it as an order, not as a figure"
    )
