"""What a scheme of the planner asks of its stages."""

import pytest

from ds_local.cluster.scheme_samples import (
    sample_of,
    schedule_for,
    section_for,
    streams_leaving_a_node,
    timer_for,
)
from ds_local.schedules.simulator import Costs


def test_streams_that_leave_a_node():
    # 2 stages x 4 replicas on 2 nodes of 4: ranks are stage-major, so a node is a stage: every
    # activation crosses, no ring does
    assert streams_leaving_a_node(2, 4, "across_nodes", 4) == (4, 0)
    # replica-major: a node holds two whole pipelines; each stage's ring leaves the node once
    assert streams_leaving_a_node(2, 4, "within_node", 4) == (0, 2)
    assert streams_leaving_a_node(1, 4, "across_nodes", 4) == (0, 0)


@pytest.mark.parametrize(
    ("scheme", "micro_batches", "backprop"),
    [("mixed 1/4", 8, 2), ("mixed 1/2", 8, 4), ("mixed 1/2", 3, 1)],
)
def test_a_mix_keeps_its_share_of_backpropagation(scheme, micro_batches, backprop):
    modes = [routes.mode for routes in schedule_for(scheme, 4, micro_batches).rows]
    assert modes == ["backprop"] * backprop + ["local"] * (micro_batches - backprop)


def test_what_a_row_asks_of_its_stages():
    local, true, mixed = (sample_of(scheme, 4, 16) for scheme in ("local", "backprop", "mixed 1/4"))
    assert local.losses == [1.0, 1.0, 1.0, 1.0]
    assert true.losses == [0.0, 0.0, 0.0, 1.0]
    assert mixed.losses == [0.75, 0.75, 0.75, 1.0]
    assert local.peak_live == (1, 1, 1, 1)
    assert true.peak_live == (4, 3, 2, 1)
    assert [one.sends_gradients for one in (local, true, mixed)] == [False, True, True]


def test_a_sample_is_of_a_few_micro_batches():
    assert len(sample_of("local", 2, 1000).rows) == 8
    assert sample_of("backprop, split 2", 2, 1000).peak_deferred[1] > 0


def test_a_timer_and_a_schedule_are_made_once():
    assert schedule_for("local", 2, 4) is schedule_for("local", 2, 4)
    assert timer_for("local", 2, 4).steady_period(Costs()) == 12.0
    assert section_for("mixed 1/4", 8)["mix"][0]["micro_batches"] == 2
