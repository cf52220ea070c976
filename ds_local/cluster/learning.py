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

from ds_local.errors import counted

DATA = Path(__file__).with_name("learning.json")
EXACT = ("data parallel", "backprop")
FULL: dict[str, Any] = {}  # the head that has no options
FAR = 2  # a row more times above or below a model's vocabulary / width says little about the model


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
        far: a row that it comes from has a vocabulary / width more than `FAR` times off.
    """

    tokens: float | None = 1.0
    source: str = "gradients of backprop"
    far: bool = False

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
    more segments than were measured what they cost with full heads and no tail.
    """
    scheme = name.partition(", split")[0]
    if scheme in EXACT:
        return BACKPROPS
    ratio = vocabulary_over_width
    alike = _nearest(scheme, head, stages, ratio, delay, tail)
    row = alike or _nearest(scheme, FULL, stages, ratio, delay, tail)
    whole = _named(scheme, row.head if row else FULL, tail)
    if row is None or row.tokens is None:
        return Learning(None, _why_not(whole, row, delay))
    source, tokens, used = f"{whole} on {_where(row)}", row.tokens, [row]
    more = _nearest(scheme, FULL, stages, ratio)
    if more and (further := _times(more, row.segments) or 1.0) > 1:
        tokens *= further
        source += f"; times {further:.2f} for more segments, as with full heads and no tail"
        used.append(more)
    if delay:
        source += f", gradients up to {row.delay:.2f} steps old, here {delay:.2f}"
    if alike is None:
        with_head = _nearest("local", head, stages, ratio)
        if with_head is None or with_head.tokens is None:
            return Learning(None, _why_not("local with this head", with_head))
        dearer = _times(with_head, with_head.segments)
        if dearer is None:
            at = f"vocabulary / width {with_head.vocabulary_over_width:g}"
            return Learning(None, f"local with full heads at {at}: not measured")
        tokens *= dearer
        source += f"; times {dearer:.2f} for the head, of local on {_where(with_head)}"
        used.append(with_head)
    off = max(abs(math.log(one.vocabulary_over_width / ratio)) for one in used)
    return Learning(tokens, source, far=off > math.log(FAR))


def _times(row: Measured, segments: int) -> float | None:
    """How many times the tokens that its scheme needs with full heads on so many segments, at the
    same vocabulary / width; None where one of the two is not known."""
    full = _nearest(row.scheme, FULL, segments, row.vocabulary_over_width)
    if full is None or full.vocabulary_over_width != row.vocabulary_over_width:
        return None
    return row.tokens / full.tokens if row.tokens and full.tokens else None


def _named(scheme: str, head: Mapping[str, Any], tail: float) -> str:
    added = [*(["this head"] if head else []), *([f"a tail of {tail:.0%}"] if tail else [])]
    return " with ".join([scheme, *([" and ".join(added)] if added else [])])


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
    seeds, ratio = counted(row.seeds, "seed"), row.vocabulary_over_width
    return f"{row.segments} segments (vocabulary / width {ratio:g}, {seeds})"


def _why_not(what: str, found: Measured | None, delay: float = 0.0) -> str:
    if delay:
        what += f" with gradients {delay:.2f} steps old"
    return f"{what}: {'ended above every run of backprop' if found else 'not measured'}"


@cache
def measured() -> tuple[Measured, ...]:
    return tuple(Measured(**row) for row in json.loads(DATA.read_text()))
