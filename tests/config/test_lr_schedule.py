"""Warm-up, stable, decay: every step's rate, going on after a checkpoint, what is refused."""

import pytest

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.lr_schedule import WarmupStableDecayLR, scheduler_of
from ds_local.errors import ConfigError


class Optimizer:
    def __init__(self, *rates):
        self.param_groups = [{"lr": rate} for rate in rates]

    @property
    def rates(self):
        return [group["lr"] for group in self.param_groups]


def rates_of(num_steps, **params):
    """The rate of the first group in each step, beginning with the first."""
    optimizer = Optimizer(8.0, 4.0)
    scheduler = WarmupStableDecayLR(optimizer, **params)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.rates[0])
        assert optimizer.rates[1] == rates[-1] / 2
        assert scheduler.get_last_lr() == optimizer.rates
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"warmup_num_steps": 2, "decay_num_steps": 4}, [4, 8, 8, 8, 8, 8, 8, 6, 4, 2, 0, 0]),
        ({}, [8] * 9 + [4, 0, 0]),  # no warm-up, the last fifth
        ({"decay_num_steps": 4, "decay_min_ratio": 0.5}, [8] * 7 + [7, 6, 5, 4, 4]),
        ({"decay_num_steps": 0}, [8] * 12),
    ],
)
def test_the_rate_of_every_step(params, expected):
    assert rates_of(12, total_num_steps=10, **params) == expected


def test_it_goes_on_where_it_was():
    params = {"total_num_steps": 10, "warmup_num_steps": 2, "decay_num_steps": 4}
    whole, first = rates_of(10, **params), WarmupStableDecayLR(Optimizer(8.0), **params)
    for _ in range(7):
        first.step()
    resumed = Optimizer(8.0)
    second = WarmupStableDecayLR(resumed, **params)
    second.load_state_dict(first.state_dict())
    assert resumed.rates == [whole[7]]
    second.step()
    assert resumed.rates == [whole[8]]


def config_of(**params):
    return {"scheduler": {"type": "WarmupStableDecayLR", "params": params}}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"total_num_steps": 10, "warmup_num_steps": 7, "decay_num_steps": 4},
            "7 and decay_num_steps 4",
        ),
        ({"total_num_steps": 10, "decay_num_steps": -1}, "decay_num_steps -1"),
        ({"total_num_steps": 10, "decay_min_ratio": 2}, "between 0 and 1, got 2"),
        ({"total_num_steps": "10"}, "total_num_steps must be a number, got '10'"),
        ({}, "total_num_steps"),
        ({"total_num_steps": 10, "cos_min_ratio": 0.1}, "cos_min_ratio"),
    ],
)
def test_a_mistake_in_its_parameters(params, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_deepspeed(config_of(**params))
    assert "scheduler.params" in str(caught.value)


def test_its_short_name_is_the_same_schedule_checked_the_same():
    params = {"total_num_steps": 10, "warmup_num_steps": 2}
    made = scheduler_of({"scheduler": {"type": "WSD", "params": params}})
    assert isinstance(made(Optimizer(8.0)), WarmupStableDecayLR)
    with pytest.raises(ConfigError, match=r"scheduler\.params of WSD: .*warmup_steps"):
        check_deepspeed({"scheduler": {"type": "WSD", "params": {"warmup_steps": 2}}})


def test_schedulers_of_others_are_left_to_deepspeed():
    assert (
        scheduler_of({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 10}}})
        is None
    )
    assert scheduler_of({}) is None
    check_deepspeed(config_of(total_num_steps=10))
