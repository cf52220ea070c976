"""The order of training: every sequence once a pass, or sources in the ratio of their weights."""

from collections import Counter

import pytest

from ds_local.data.order import Order, quotas


@pytest.mark.parametrize(
    ("counts", "weights", "found"),
    [
        ([10, 10], [1, 1], [10, 10]),
        ([30, 10], [1, 1], [20, 20]),
        ([30, 10], [3, 1], [30, 10]),
        ([7, 3], [0.9, 0.1], [9, 1]),
        ([5, 5, 1], [1, 1, 1], [4, 4, 3]),
        ([1, 99], [1e-6, 1], [0, 100]),
        ([8], [0.3], [8]),
    ],
)
def test_quotas_are_in_the_ratio_of_the_weights(counts, weights, found):
    assert quotas(counts, weights) == found
    assert sum(found) == sum(counts)


def test_without_weights_each_sequence_comes_once_a_pass():
    order = Order((20,))
    passes = [[order.row(0, p) for p in range(e * 20, e * 20 + 20)] for e in range(3)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert order.rows(0, 28, 4) == order.rows(0, 28, 4) != order.rows(1, 28, 4)
    assert order.rows(0, 20, 20) == [order.row(0, p) for p in range(20, 40)]


def test_steps_may_span_the_end_of_a_pass():
    ids = [i for step in range(10) for i in Order((7,)).rows(3, 3 * step, 3)]
    assert sorted(ids[:7]) == sorted(ids[7:14]) == list(range(7))


def test_with_weights_a_pass_has_the_share_of_each_source():
    counts, shares = (30, 10), (10, 30)
    order = Order(counts, shares)
    for number in range(3):
        rows = [order.row(5, p) for p in range(number * 40, number * 40 + 40)]
        assert sum(row < 30 for row in rows) == 10
        small = Counter(row for row in rows if row >= 30)
        assert set(small.values()) == {3}  # each of the 10 three times
    # the large source is gone through once in three passes
    rows = [row for p in range(120) if (row := order.row(5, p)) < 30]
    assert sorted(rows) == list(range(30))
    assert rows != sorted(rows)


def test_sources_of_one_size_have_orders_of_their_own():
    order = Order((50, 50), (50, 50))
    rows = [order.row(1, p) for p in range(100)]
    first = [row for row in rows if row < 50]
    second = [row - 50 for row in rows if row >= 50]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert sorted(rows[:20]) != sorted(rows[80:])
