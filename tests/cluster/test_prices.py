"""What a candidate costs."""

import pytest

from ds_local.cluster.candidates import Candidate
from ds_local.cluster.prices import Price, over_the_run


def test_what_costs_most_is_said():
    one = Candidate(4, 1, "local", "full", 1, 8)
    parts = {"the model's own work": 6.0, "auxiliary heads": 1.0, "averaging gradients": 0.5}
    price = Price(one, 10.0, 80, 0.0, parts, 0.0, 0.0)
    assert price.loss == "25% of the step is waiting for other stages or links"
    assert price.tokens_per_second == 8.0
    assert Price(one, 7.5, 80, 0.0, parts, 0.0, 0.0).loss == "13% of the step is auxiliary heads"
    own = Price(one, 6.0, 80, 0.0, {"the model's own work": 6.0}, 0.0, 0.0)
    assert own.loss == "nothing much"


def test_a_run_of_two_parts_is_their_mean_in_the_memory_of_the_fuller():
    first, end = (
        Price(Candidate(4, 1, scheme, "full", 1, 8), seconds, 80, memory, {"work": work}, 4.0, 2.0)
        for scheme, seconds, memory, work in (
            ("local", 10.0, 5.0, 8.0),
            ("backprop", 20.0, 7.0, 12.0),
        )
    )
    first.idle_share, end.idle_share = 0.1, 0.4
    whole = over_the_run(Candidate(4, 1, "both", "full", 1, 8), [(0.75, first), (0.25, end)])
    assert whole.candidate.scheme == "both"
    assert (whole.step_seconds, whole.memory, whole.parts) == (12.5, 7.0, {"work": 9.0})
    assert (whole.bytes_per_edge, whole.bytes_reduced, whole.tokens) == (4.0, 2.0, 80)
    assert whole.idle_share == pytest.approx((0.75 * 1 + 0.25 * 8) / 12.5)  # of the time, by hand
