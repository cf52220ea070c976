"""Priced layouts as the text that the planner prints."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ds_local.cluster.candidates import GIB
from ds_local.cluster.planner import Plan
from ds_local.cluster.prices import Price


def line(price: Price, tokens: float | None) -> str:
    needed = price.learning.tokens
    seconds = (tokens or 0) * price.learning.times / price.tokens_per_second
    hours = f"{seconds / 3600:>9,.1f}  " if tokens else ""
    return (
        f"{price.tokens_per_second:>12,.0f}  {price.idle_share:>5.0%}  {price.memory / GIB:>7.1f}  "
        f"{price.bytes_per_edge / 1e9:>7.2f}  {f'{needed:.2f}' if needed else '?':>6}  {hours}"
        f"{price.candidate}"
    )


def report(found: Plan, memory_gib: float, tokens: float | None, best: int, sources: bool) -> str:
    """The best layouts, the best of every other scheme, what does not fit.

    Args:
        tokens: that backpropagation would train on; None: no hours.
        best: so many layouts in full.
        sources: say where it is known from how many tokens each scheme needs.
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
    if sources:
        lines += ["", *_sources(found.best)]
    return "\n".join(lines)


def _sources(prices: list[Price]) -> Iterator[str]:
    """Where it is known from how many tokens each scheme needs."""
    yield "tokens: needed for a loss, in parts of backpropagation's (docs/quality.md):"
    for price in sorted(prices, key=lambda p: p.learning.tokens or math.inf):
        needed = price.learning.tokens
        yield f"{f'{needed:.2f}' if needed else '?':>6}  {price.candidate.scheme}: " + (
            price.learning.source
        )


def _too_large(found: Plan, memory_gib: float) -> str:
    return "\n".join(
        f"does not fit    {price.candidate}: {price.memory / GIB:,.0f} GiB on a device of "
        f"{memory_gib:g}"
        for price in found.too_large.values()
    )
