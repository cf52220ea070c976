"""What segments cost, worked out by hand: two segments of two blocks each."""

import json

import pytest
from reference import GPT2

from ds_local.config.schema import HeadConfig, LocalParallelConfig
from ds_local.model import families
from ds_local.model.flops import UnitCosts, choose_parts, segment_times, stage_flops, unit_flops
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes

UNIT, PARTS = UnitCosts(block=3.0, readout=6.0, heads=[4.0]), [0, 3, 6]


def test_a_third_of_a_block_goes_forward():
    assert segment_times(UNIT, PARTS) == ([2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [4.0, 6.0])


@pytest.mark.parametrize(
    ("mode", "auxiliary"),
    [("local", [2 * 4.0, 0.0]), ("backprop", [0.0, 0.0])],
)
def test_two_micro_batches_on_two_stages(mode, auxiliary):
    schedule = make_schedule([(make_routes(mode, 2), 2)], 2)
    costs = stage_flops(schedule, UNIT, PARTS)
    # forward 2, backward 4 in each; the readout is with the last
    assert [cost["useful"] for cost in costs] == [2 * 6.0, 2 * (6.0 + 6.0)]
    assert [cost["auxiliary"] for cost in costs] == auxiliary


@pytest.mark.parametrize(
    ("head", "cost"),
    [
        ({}, 3 * 2 * 32 * 64),
        ({"token_fraction": 0.25}, 3 * 2 * 32 * 64 / 4),
        ({"readout": "shared"}, 2 * 2 * 32 * 64),  # its weights learn nothing here
        ({"rank": 8}, 3 * 2 * 8 * (32 + 64)),
        ({"readout": "shared", "adapter": True}, 2 * 2 * 32 * 64 + 3 * 2 * 32 * 32),
        ({"vocabulary": 7}, 3 * 2 * 32 * 8),  # and the class of the rest
        ({"vocabulary": 7, "rank": 8}, 3 * 2 * 8 * (32 + 8)),
        ({"vocabulary": 7, "token_fraction": 0.25}, 3 * 2 * 32 * 8 / 4),
        ({"vocabulary": 7, "rare_samples": 4}, 3 * 2 * 32 * (7 + 4 + 1)),  # and the next token
        # the companion is at every position
        ({"companion": 0.5}, 3 * 2 * 32 * 64 + 3 * 2 * 32 * 32),
        ({"companion": 2.0, "token_fraction": 0.25}, 3 * 2 * 32 * 64 / 4 + 3 * 2 * 32 * 32),
    ],
    ids=str,
)
def test_heads_of_width_32_over_64_tokens(head, cost):
    unit = unit_flops(families.load_model_config(GPT2), HeadConfig(**head), 3, 16)
    assert unit.heads == [cost, cost]
    assert unit.readout == 3 * 2 * 32 * 64


@pytest.mark.parametrize(("head", "cut"), [(0.0, 2), (9.0, 1), (0.001, 3)])
def test_a_profile_without_heads_balances_those_of_the_config(tmp_path, head, cut):
    """Blocks of 3 seconds: a head by its operations takes half a second, and moves no block."""
    costs = {"forward": [2, 2], "input_grad": [2, 2], "weight_grad": [2, 2], "head": [head, 3.2]}
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"costs": costs, "layout": {"segment_parts": [0, 3, 6]}}))
    section = LocalParallelConfig(mode="local", partition=str(profile))
    found = choose_parts(families.load_model_config(GPT2), section, 2, 4, 16)
    assert found == [0, cut + 1, 6]
