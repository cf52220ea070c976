"""Measured times of heads beside their floating-point operations."""

import pytest

from ds_local.config.catalog import head_of
from ds_local.config.sections import HeadConfig
from ds_local.model.head_times import MEASURED, time_over_flops


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_head_is_found_in_any_model(name):
    options, factor = MEASURED[name]
    for vocabulary in (512, 50257):
        head = HeadConfig(**head_of(options, vocabulary))
        assert time_over_flops(head, vocabulary) == factor


def test_what_takes_no_time_of_its_own_does_not_matter():
    often = HeadConfig(readout="shared", token_fraction=0.125, refresh_every=5)
    assert time_over_flops(often, 512) == time_over_flops(
        often.model_copy(update={"refresh_every": 20}), 512
    )
    half = HeadConfig(token_fraction=0.125, companion=0.5)
    assert time_over_flops(half, 512) == time_over_flops(
        half.model_copy(update={"companion": 1.0}), 512
    )


def test_other_heads_are_taken_by_their_operations():
    assert time_over_flops(HeadConfig(), 512) == 1
    assert time_over_flops(HeadConfig(token_fraction=0.3), 512) == 1
    assert time_over_flops(HeadConfig(rank=7), 512) == 1
