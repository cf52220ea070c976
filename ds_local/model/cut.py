"""Where to cut a model: segment boundaries that make the busiest segment as light as possible.

The same solver balances local training, where every segment but the last also pays for its
auxiliary head, and the backprop baseline, where none does. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ds_local.errors import ConfigError


def balance(costs: Sequence[float], extras: Sequence[float]) -> list[int]:
    """Boundaries [0, ..., len(costs)] of `len(extras)` consecutive segments whose largest cost is
    minimal.

    The cost of a segment is the sum of its layers' `costs` plus its entry of `extras` (its head).
    Among equally good cuts the one with the smallest sum of squares wins, so that no segment is
    needlessly heavy.

    Raises:
        ConfigError: when there are fewer layers than segments.
    """
    num_layers, num_segments = len(costs), len(extras)
    if num_layers < num_segments:
        raise ConfigError(
            f"{num_layers} layers cannot be cut into {num_segments} segments; use fewer stages or "
            "a deeper model"
        )
    total = [0.0, *accumulate(costs)]
    # best[k][n]: (largest cost, sum of squares, start of the last segment) of the first k segments
    # over the first n layers
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for segment, extra in enumerate(extras):
        row = {}
        for stop in range(segment + 1, num_layers - (num_segments - segment - 1) + 1):
            options = []
            for start, (largest, squares, _) in best[-1].items():
                if start < stop:
                    cost = total[stop] - total[start] + extra
                    options.append((max(largest, cost), squares + cost * cost, start))
            row[stop] = min(options)
        best.append(row)
    boundaries = [num_layers]
    for row in reversed(best[1:]):
        boundaries.append(row[boundaries[-1]][2])
    return boundaries[::-1]
