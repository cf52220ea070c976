"""Measured times of heads beside their floating-point operations."""

import pytest

from ds_local.config.catalog import Sizes, head_of
from ds_local.config.sections import HeadConfig
from ds_local.model.head_times import MEASURED, time_over_flops

SMALL = Sizes(512, 64)


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_head_is_found_in_any_model(name):
    options, factor = MEASURED[name]
    for model in (SMALL, Sizes(50257, 768)):
        head = HeadConfig(**head_of(options, model))
        assert time_over_flops(head, model) == factor


def test_what_takes_no_time_of_its_own_does_not_matter():
    often = HeadConfig(readout="shared", token_fraction=0.125, refresh_every=5)
    assert time_over_flops(often, SMALL) == time_over_flops(
        often.model_copy(update={"refresh_every": 20}), SMALL
    )
    half = HeadConfig(token_fraction=0.125, companion=0.5)
    assert time_over_flops(half, SMALL) == time_over_flops(
        half.model_copy(update={"companion": 1.0}), SMALL
    )


def test_other_heads_are_taken_by_their_operations():
    assert time_over_flops(HeadConfig(), SMALL) == 1
    assert time_over_flops(HeadConfig(token_fraction=0.3), SMALL) == 1
    assert time_over_flops(HeadConfig(rank=7), SMALL) == 1
