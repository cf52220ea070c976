"""Several sources in one stream of training: how much of each, and in which order.

A pass has as many sequences as there are. With weights, each source gives its share of them, going
through its own sequences as often as that takes; without, each sequence comes once. The order is a
pure function of (seed, position).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def quotas(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Sequences of each source in a pass: in the ratio of the weights, as many together as there
    are."""
    total = sum(counts)
    exact = [weight / sum(weights) * total for weight in weights]
    whole = [int(one) for one in exact]
    largest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in largest[: total - sum(whole)]:
        whole[i] += 1
    return whole


class Order(NamedTuple):
    """In which order training sees sequences, which lie source by source.

    `counts`: sequences of each source; `shares`: of each in a pass (`quotas`), None when each
    sequence comes once.
    """

    counts: tuple[int, ...]
    shares: tuple[int, ...] | None = None

    def rows(self, seed: int, position: int, count: int) -> list[int]:
        """So many sequences, from a position of training on."""
        return [self.row(seed, p) for p in range(position, position + count)]

    def row(self, seed: int, position: int) -> int:
        """The sequence at a position (from 0) of training."""
        total = sum(self.counts)
        number, place = divmod(position, total)
        slot = int(_permutation((seed, number), total)[place])
        if self.shares is None:
            return slot
        first = first_slot = source = 0
        while slot >= first_slot + self.shares[source]:
            first += self.counts[source]
            first_slot += self.shares[source]
            source += 1
        count = self.counts[source]
        again, place = divmod(number * self.shares[source] + slot - first_slot, count)
        # numbers from 1, as (seed, number, 0) would be (seed, number) to numpy
        return first + int(_permutation((seed, again, source + 1), count)[place])


@functools.lru_cache(maxsize=64)
def _permutation(key: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)
