"""The bound and the memory of one candidate, worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_pricing import even

from ds_local.cluster.candidate_cost import CandidateCost
from ds_local.cluster.candidates import Candidate, Cluster
from ds_local.cluster.pricing import Pricing
from ds_local.config.sections import HeadConfig
from ds_local.model.flops import UnitCosts


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


def test_memory_by_hand():
    pricing = Pricing(even(2, kept=50), Cluster(1, 2, 1, 80, 1, 1, reserve_gib=0), 8, zero_stage=0)
    local, true = (
        pricing.price(Candidate(2, 1, scheme, "", 4, 2)).memory for scheme in ("local", "backprop")
    )
    # 100 fp32 parameters with gradient and two moments; per live micro-batch 40 tokens x (50 kept +
    # 8 at the boundary) numbers
    assert local == 1600 + 40 * 58 * 4
    assert true == 1600 + 2 * 40 * 58 * 4


def cost_of(scheme="local", stages=2, micro_batches=4, replicas=1, **how):
    """On one node; blocks take 3 seconds, a message of 10 tokens x (8 x 4 + 4) bytes takes 2."""
    cluster = Cluster(1, 4, 1, 80, 1, 8 * 360 / 1e9 / 2, reserve_gib=0)
    candidate = Candidate(stages, replicas, scheme, "", 1, micro_batches, **how)
    cuts, unit = list(range(stages + 1)), UnitCosts(3.0, 0.0, [0.0])
    return CandidateCost(candidate, even(stages), cluster, cuts, unit, zero_stage=0)


def test_work_of_a_stage_by_hand():
    cost = cost_of()
    assert cost.pass_seconds == [1.0, 1.0]
    assert cost.message == 360
    assert cost.edge_seconds == 2.0
    assert cost.busy == [4 * 3.0, 4 * 3.0]
    assert cost.mean_busy == 12.0
    assert cost.network_seconds == 4 * 2.0
    assert cost_of(recompute=True).busy == [4 * 4.0, 4 * 4.0]


def test_the_round_trip_bounds_backpropagation():
    # stage 0 forward and back 3, both ways over the link 4, all micro-batches on stage 1: 4 x 3
    assert cost_of("backprop").price(4).step_seconds == 3 + 4 + 12
    # a deferred weight gradient is not waited for
    assert cost_of("backprop, split 1").price(4).step_seconds == 2 + 4 + 8
    assert cost_of("local").price(4).step_seconds == 12


def test_averaging_is_over_the_replicas_of_a_stage():
    cost = cost_of(replicas=2)
    # 100 fp32 parameters: half of 400 bytes each way, twice, over 180 bytes a second
    assert cost.reduced == [200.0, 200.0]
    assert cost.reduce_seconds == pytest.approx([400 / 180] * 2)
    assert cost_of().reduce_seconds == [0.0, 0.0]


def test_a_simulated_step_takes_no_less_than_the_bound():
    for scheme in ("local", "backprop"):
        cost = cost_of(scheme)
        assert cost.period(4) >= cost.price(4).step_seconds
    assert cost_of("local").period(4) == 12.0


def test_parts_of_a_step_are_those_of_the_price():
    price = cost_of(recompute=True, replicas=2).price(8)
    assert price.parts["the model's own work"] == 12.0
    assert price.parts["recomputing activations"] == 4.0
    assert price.parts["stages that cannot be cut evenly"] == pytest.approx(0.0)
    assert (price.tokens, price.bytes_per_edge, price.bytes_reduced) == (80, 4 * 360, 400.0)


@pytest.mark.parametrize(
    ("head", "trained"),
    [
        ({}, 8 * 64),
        ({"vocabulary": 7}, 8 * 8),
        ({"vocabulary": 7, "rank": 2}, 2 * (8 + 8)),
        ({"vocabulary": 7, "rare_samples": 2}, 8 * 64),
        ({"companion": 0.5, "token_fraction": 0.125}, 8 * 64 + 8 * 8),
        ({"readout": "shared", "companion": 0.5}, 8 * 8),
        ({"readout": "shared", "adapter": True}, 8 * 8),
        ({"vocabulary": 7, "blocks": 1}, 8 * 8 + 100),
        ({"vocabulary": 7, "blocks": 1, "blocks_from": "next_tracked"}, 8 * 8),
    ],
    ids=str,
)
def test_what_a_head_trains_by_hand(head, trained):
    """Width 8, 64 tokens, 100 parameters a block; half of the fp32 gradients go each way."""
    model = replace(even(2), config=SimpleNamespace(vocab_size=64), readout_params=8 * 64)
    cluster, candidate = Cluster(1, 4, 1, 80, 1, 1), Candidate(2, 2, "local", "its own", 1, 4)
    cost = CandidateCost(
        candidate, model, cluster, [0, 1, 2], UnitCosts(3.0, 0.0, [0.0]), 0, HeadConfig(**head)
    )
    assert cost.reduced == [(100 + trained) * 4 / 2, (100 + 8 * 64) * 4 / 2]
