"""Cuts that make the busiest segment as light as possible."""

import itertools
import random

import pytest

from ds_local.model.cut import balance


@pytest.mark.parametrize(
    ("costs", "extras", "expected"),
    [
        ([1, 1, 1, 1], [0, 0], [0, 2, 4]),
        ([1, 1, 1, 3], [0, 0], [0, 3, 4]),  # a readout on the last layer
        ([1, 1, 1, 3], [2, 0], [0, 2, 4]),  # and a head on the first segment: balanced again
        ([1] * 12, [0, 0, 0, 0], [0, 3, 6, 9, 12]),
        ([5], [0], [0, 1]),
    ],
)
def test_known_cuts(costs, extras, expected):
    assert balance(costs, extras) == expected


@pytest.mark.parametrize("seed", range(50))
def test_no_other_cut_is_better(seed):
    rng = random.Random(seed)
    costs = [rng.randint(1, 9) for _ in range(rng.randint(3, 9))]
    extras = [rng.randint(0, 9) for _ in range(rng.randint(1, min(4, len(costs))))]

    def busiest(bounds):
        return max(
            sum(costs[a:b]) + e
            for (a, b), e in zip(itertools.pairwise(bounds), extras, strict=True)
        )

    found = balance(costs, extras)
    inner = itertools.combinations(range(1, len(costs)), len(extras) - 1)
    assert busiest(found) == min(busiest([0, *cut, len(costs)]) for cut in inner)
    assert sorted(set(found)) == found


def test_too_few_layers():
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 segments"):
        balance([1, 1], [0, 0, 0])
