"""Priced layouts as the text that the planner prints."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ds_local.cluster.candidates import GIB
from ds_local.cluster.learning import FAR
from ds_local.cluster.planner import Plan
from ds_local.cluster.prices import Price


def line(price: Price, tokens: float | None) -> str:
    seconds = (tokens or 0) * price.learning.times / price.tokens_per_second
    hours = f"{seconds / 3600:>9,.1f}  " if tokens else ""
    return (
        f"{price.tokens_per_second:>12,.0f}  {price.idle_share:>5.0%}  {price.memory / GIB:>7.1f}  "
        f"{price.bytes_per_edge / 1e9:>7.2f}  {_needed(price):>6}  {hours}"
        f"{price.candidate}"
    )


def _needed(price: Price) -> str:
    """Tokens, with a sign where they were measured far from the model."""
    learning = price.learning
    return f"{learning.tokens:.2f}{'*' * learning.far}" if learning.tokens else "?"


def report(
    found: Plan, memory_gib: float, tokens: float | None, best: int, ratio: float | None
) -> str:
    """The best layouts, the best of every other scheme, what does not fit.

    Args:
        tokens: that backpropagation would train on; None: no hours.
        best: so many layouts in full.
        ratio: the model's vocabulary / width, to say where it is known from how many tokens each
            scheme needs; None: every scheme needs as many.
    """
    hours = f"{'hours':>9}  " if tokens else ""
    head = (
        f"{'tokens/s':>12}  {'idle':>5}  {'GiB':>7}  {'GB/edge':>7}  {'tokens':>6}  {hours}layout"
    )
    if not found.best:
        return "nothing fits\n" + _too_large(found, memory_gib)
    everything = sorted(
        [*found.best, *(p for rest in found.runners_up.values() for p in rest)],
        key=lambda p: p.rank,
    )
    first, *others = found.best
    lines = [head, *(line(price, tokens) for price in everything[:best])]
    lines += ["", "the best of every other scheme, and what costs it most:"]
    for price in others:
        known = price.learning.tokens is not None
        lines.append(
            f"{f'{first.cost / price.cost:.0%}' if known else '?':>6} of the best  "
            f"{price.candidate}: {price.loss}"
        )
    if found.too_large:
        lines.append(_too_large(found, memory_gib))
    if ratio is not None:
        lines += ["", *_sources(found.best)]
        if any(price.learning.far for price in everything):
            lines.append(
                f"*: measured at a vocabulary / width more than a factor of {FAR} from the "
                f"{ratio:.0f} of this model: an order, not a figure"
            )
    return "\n".join(lines)


def _sources(prices: list[Price]) -> Iterator[str]:
    """Where it is known from how many tokens each scheme needs."""
    yield "tokens: needed for a loss, in parts of backpropagation's (docs/quality.md):"
    for price in sorted(prices, key=lambda p: p.learning.tokens or math.inf):
        yield f"{_needed(price):>6}  {price.candidate.scheme}: {price.learning.source}"


def _too_large(found: Plan, memory_gib: float) -> str:
    return "\n".join(
        f"does not fit    {price.candidate}: {price.memory / GIB:,.0f} GiB on a device of "
        f"{memory_gib:g}"
        for price in found.too_large.values()
    )
