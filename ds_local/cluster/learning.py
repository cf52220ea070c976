"""How many tokens a scheme needs to end where backpropagation does: the nearest measured row.

learning.json holds rows of the quality study (docs/quality.md) without tails and, of forwards that
run ahead, those of docs/run-ahead.md; `scripts/generated_pages.py` writes it. Gradients of data
parallelism and of a split backward are those of backpropagation, so they need as many tokens.
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
    row: str,
    head: Mapping[str, Any],
    stages: int,
    vocabulary_over_width: float,
    delay: float = 0.0,
) -> Learning:
    """Of a scheme (see docs/schemes.md) with these options of "head", whose oldest gradients are
    `delay` steps old.

    Of those with gradients no younger, the row nearest in delay is taken, then the one nearest in
    segments, then in vocabulary / width, then the one with the most seeds. A head that was not
    measured with the scheme is taken to cost as much as it cost local learning.
    """
    scheme = row.partition(", split")[0]
    if scheme in EXACT:
        return BACKPROPS
    base = _nearest(scheme, FULL, stages, vocabulary_over_width, delay)
    if base is None or base.tokens is None:
        return Learning(None, _why_not(scheme, base, delay))
    source = f"{scheme} on {base.segments} segments, {_seeds(base)}"
    if delay:
        source += f", gradients up to {base.delay:.2f} steps old, here {delay:.2f}"
    if not head:
        return Learning(base.tokens, source)
    of = scheme if _nearest(scheme, head, stages, vocabulary_over_width) else "local"
    with_head = _nearest(of, head, stages, vocabulary_over_width)
    if with_head is None or with_head.tokens is None:
        return Learning(None, _why_not(f"{of} with this head", with_head))
    full = _nearest(of, FULL, with_head.segments, with_head.vocabulary_over_width)
    if full is None or full.tokens is None:
        return Learning(None, _why_not(f"{of} with a full head", full))
    more = with_head.tokens / full.tokens
    where = f"of {of} on {with_head.segments}, {_seeds(with_head)}"
    return Learning(base.tokens * more, f"{source}; times {more:.2f} for the head, {where}")


def _nearest(
    scheme: str,
    head: Mapping[str, Any],
    segments: int,
    vocabulary_over_width: float,
    delay: float = 0.0,
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
        if one.scheme == scheme and one.head == head and one.delay >= delay - 1e-9
    ]
    known = [one for one in found if one.tokens is not None]
    return min(known or found, key=distance, default=None)


def _seeds(row: Measured) -> str:
    return f"{row.seeds} seed{'s' if row.seeds > 1 else ''}"


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
