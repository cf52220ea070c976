"""Simulated times of whole runs."""

import pytest

from ds_local.study.forecast import predict
from ds_local.study.methods import METHODS
from ds_local.study.recipes import gpt2


def test_a_split_backward_takes_the_bubble_out_of_the_forecast():
    """By the known makespans; heads and the readout cost next to nothing beside so wide a block."""
    wide = gpt2(8, 512, 4, 16, 64)
    _, plain, split = predict(wide, METHODS["chunked 2"], 4, 64)
    assert plain[4, 0] == pytest.approx(15 / 21, rel=0.01)
    assert split[4, 0] == pytest.approx(12 / 21, rel=0.01)
    assert split[8, 0] == pytest.approx(24 / 33, rel=0.01)


def test_forwards_that_run_ahead_leave_no_bubble_to_a_split():
    wide = gpt2(8, 512, 4, 16, 64)
    _, plain, split = predict(wide, METHODS["chunked 2, run ahead"], 4, 64)
    assert plain == split
    assert plain[4, 0] == pytest.approx(12 / 21, rel=0.01)


def test_one_micro_batch_is_foreseen_too_where_nothing_is_mixed():
    """1F1B takes it up and down four stages, each of them busy for a quarter of the time."""
    wide = gpt2(8, 512, 4, 16, 64)
    _, plain, split = predict(wide, METHODS["local"], 4, 64)
    assert plain[1, 0] == pytest.approx(1 / 4, rel=0.02)
    assert {count for count, _ in plain} == {count for count, _ in split} == {1, 4, 8, 16}
    for name in ("mixed 1/4", "chunked 2, last 40 % half corrected"):
        assert {count for count, _ in predict(wide, METHODS[name], 4, 64).time} == {4, 8, 16}


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].renew])
@pytest.mark.slow
def test_every_method_can_be_foreseen(name):
    assert predict(gpt2(8, 64, 4, 512, 64), METHODS[name], 4, 64).time
