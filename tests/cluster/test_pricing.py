import json

import pytest

from ds_local.cluster.candidates import ROWS, Candidate, Cluster, Model, measured_model
from ds_local.cluster.pricing import Pricing, expected_memory
from ds_local.cluster.row_samples import schedule_for, streams_leaving_a_node
from ds_local.errors import ConfigError
from ds_local.model.flops import UnitCosts, stage_flops
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, StepTimer, simulate


def even(stages=4, seconds=3.0, kept=0):
    """A model of one block a stage; a block's forward and gradients take a second each, per
    sequence."""
    return Model(stages, 8, 10, UnitCosts(seconds, 0.0, [0.0]), None, 100, 0, 0, kept, 4)


@pytest.mark.parametrize("row", ROWS)
def test_the_quick_timer_agrees_with_the_simulator(row):
    stages = 1 if row == "data parallel" else 4
    costs = Costs(
        [1.0, 1.3, 0.8, 1.1][:stages],
        1.2,
        0.9,
        [0.3, 0.1, 0.2, 0.5][:stages],
        0.7,
        [2.0, 1.0, 0.0, 1.0][:stages],
    )
    schedule = schedule_for(row, stages, 8)
    assert StepTimer(schedule).steady_period(costs) == pytest.approx(
        simulate(schedule, costs).steady_period
    )


@pytest.mark.parametrize("row", [row for row in ROWS if row != "data parallel"])
def test_no_layout_is_faster_than_its_bound(row):
    cluster = Cluster(1, 4, 1, 80, 1e-6, 1e-6)
    pricing = Pricing(even(), cluster, 40)
    price = pricing.price(Candidate(4, 1, row, "", 1, 40))
    simulated = pricing.simulate(price)
    assert simulated.step_seconds >= price.step_seconds * (1 - 1e-9)
    costs = Costs(1.0, 1.0, 1.0, 0.0, link=8 * 10 * (8 * 4 + 4) / 1e3)
    exact = simulate(schedule_for(row, 4, 40), costs).steady_period
    assert simulated.step_seconds == pytest.approx(exact, rel=1e-6)


def test_run_ahead_by_hand():
    """No stage waits; for that a stage keeps a second copy of its 100 parameters."""
    cluster = Cluster(1, 4, 1, 80, 1e9, 1e9)
    pricing = Pricing(even(), cluster, 4)
    ahead, plain = (
        pricing.simulate(pricing.price(Candidate(4, 1, row, "", 1, 4)))
        for row in ("chunked 2, run ahead", "chunked 2")
    )
    assert ahead.step_seconds == pytest.approx(12)
    assert plain.step_seconds == pytest.approx(15)
    assert ahead.memory - plain.memory == pytest.approx(400)


def test_a_data_parallel_step_by_hand():
    cluster = Cluster(
        nodes=4, devices_per_node=1, tflops=1, memory_gib=1, link_gbps=1e-6, intra_gbps=1
    )
    price = Pricing(even(1), cluster, 8).price(Candidate(1, 4, "data parallel", "", 2, 1))
    # 100 fp32 parameters: each device sends 2 x 3/4 of 400 bytes over 125 bytes a second, after 2
    # sequences of 3 seconds
    assert price.step_seconds == pytest.approx(6 + 600 / 125)
    assert price.bytes_reduced == 600
    assert price.tokens == 80
    assert "averaging gradients" in price.loss


def test_local_training_by_hand():
    cluster = Cluster(
        1, 4, 1, 80, 1, 8 * 360 / 1e9 / 2
    )  # a message of 10 tokens x (8 x 4 + 4) bytes takes 2 seconds
    pricing = Pricing(even(), cluster, 8)
    local, true = (
        pricing.simulate(pricing.price(Candidate(4, 1, row, "", 1, 8)))
        for row in ("local", "backprop")
    )
    assert local.step_seconds == pytest.approx(24)  # the links keep up
    assert local.idle_share == pytest.approx(0)
    assert true.step_seconds > 24 + 3 * (3 + 4)  # fill and drain, and both ways over three links
    assert local.bytes_per_edge == 8 * 360


def test_streams_that_leave_a_node():
    # 2 stages x 4 replicas on 2 nodes of 4: ranks are stage-major, so a node is a stage: every
    # activation crosses, no ring does
    assert streams_leaving_a_node(2, 4, "across_nodes", 4) == (4, 0)
    # replica-major: a node holds two whole pipelines; each stage's ring leaves the node once
    assert streams_leaving_a_node(2, 4, "within_node", 4) == (0, 2)
    assert streams_leaving_a_node(1, 4, "across_nodes", 4) == (0, 0)


def test_memory_by_hand():
    pricing = Pricing(even(2, kept=50), Cluster(1, 2, 1, 80, 1, 1, reserve_gib=0), 8, zero_stage=0)
    local, true = (
        pricing.price(Candidate(2, 1, row, "", 4, 2)).memory for row in ("local", "backprop")
    )
    # 100 fp32 parameters with gradient and two moments; per live micro-batch 40 tokens x (50 kept +
    # 8 at the boundary) numbers
    assert local == 1600 + 40 * 58 * 4
    assert true == 1600 + 2 * 40 * 58 * 4


def test_a_profile_replaces_the_flops(tmp_path):
    costs = {"forward": [2, 2], "input_grad": [1, 1], "weight_grad": [1, 1], "head": [0.5, 3.0]}
    facts = {
        "costs": costs,
        "layout": {"stages": 2, "segment_parts": [0, 3, 6], "sequences": 2},
        "measured": {"step_seconds": [40, 40], "update_seconds": [3, 5], "parameters": [100, 300]},
    }
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(facts))
    model = measured_model(even(2), profile)
    assert model.costs == UnitCosts(1.0, 1.5, [0.25])
    assert model.update_seconds == 8 / 400  # of a parameter
    del facts["measured"]
    profile.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="profile the run again"):
        measured_model(even(2), profile)


@pytest.mark.parametrize(
    ("row", "micro_batches", "backprop"),
    [("mixed 1/4", 8, 2), ("mixed 1/2", 8, 4), ("mixed 1/2", 3, 1)],
)
def test_a_mix_keeps_its_share_of_backpropagation(row, micro_batches, backprop):
    modes = [routes.mode for routes in schedule_for(row, 4, micro_batches).rows]
    assert modes == ["backprop"] * backprop + ["local"] * (micro_batches - backprop)


@pytest.mark.parametrize("mode", ["backprop", "chunked"])
def test_a_run_is_taken_for_the_row_that_splits_as_it_does(mode):
    """More micro-batches are alive on every stage; deferred, their blocks are kept whole even where
    they were recomputed."""
    from ds_local.model.families import load_model_config

    model = load_model_config({"model_type": "gpt2"})
    expected = {}
    for recompute in (0, 1):
        for split in (0, 1, 2):
            config = {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 16,
                "pipeline": {"activation_checkpoint_interval": recompute},
                "local_parallel": {"mode": mode, "split_backward": split},
            }
            expected[recompute, split] = expected_memory(model, config, 4, 1)
    assert expected[0, 0] < expected[0, 2]
    assert expected[1, 0] < expected[1, 2]
    if mode == "backprop":
        assert expected[1, 0] < 0.8 * expected[1, 1] < expected[1, 2]
    else:  # only the widest split has a row of its own
        assert expected[0, 0] == expected[0, 1]


def test_a_mix_is_taken_for_the_one_of_a_quarter():
    from ds_local.model.families import load_model_config

    model = load_model_config({"model_type": "gpt2"})
    mix = [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "local_parallel": {"mix": mix},
    }
    roomy = Pricing(Model.of(model, itemsize=4), Cluster(1, 4, 1, 1e9, 1, 1), 32, zero_stage=0)
    quarter, half = (
        roomy.price(Candidate(4, 1, row, "full", 4, 8, "across_nodes")).memory
        for row in ("mixed 1/4", "mixed 1/2")
    )
    assert expected_memory(model, config, 4, 1) == quarter < half


def test_gradients_that_are_only_handed_through_are_extra_work_split_or_not():
    """Interlocking's middle segments pass one gradient on for each that they train on: a quarter of
    their work."""
    unit, parts = UnitCosts(3.0, 0.0, [0.0] * 3), [0, 2, 3, 4, 6]  # a block a segment
    row = [(make_routes("interlocking", 4, 2), 2)]
    for split in (0, 1):
        costs = stage_flops(make_schedule(row, 4, 0.0, split), unit, parts)
        assert [cost["auxiliary"] / (cost["useful"] + cost["auxiliary"]) for cost in costs] == [
            0,
            0.25,
            0.25,
            0,
        ]
