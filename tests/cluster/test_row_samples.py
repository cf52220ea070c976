"""What a row of the planner asks of its stages."""

import pytest

from ds_local.cluster.row_samples import schedule_for, streams_leaving_a_node


def test_streams_that_leave_a_node():
    # 2 stages x 4 replicas on 2 nodes of 4: ranks are stage-major, so a node is a stage: every
    # activation crosses, no ring does
    assert streams_leaving_a_node(2, 4, "across_nodes", 4) == (4, 0)
    # replica-major: a node holds two whole pipelines; each stage's ring leaves the node once
    assert streams_leaving_a_node(2, 4, "within_node", 4) == (0, 2)
    assert streams_leaving_a_node(1, 4, "across_nodes", 4) == (0, 0)


@pytest.mark.parametrize(
    ("row", "micro_batches", "backprop"),
    [("mixed 1/4", 8, 2), ("mixed 1/2", 8, 4), ("mixed 1/2", 3, 1)],
)
def test_a_mix_keeps_its_share_of_backpropagation(row, micro_batches, backprop):
    modes = [routes.mode for routes in schedule_for(row, 4, micro_batches).rows]
    assert modes == ["backprop"] * backprop + ["local"] * (micro_batches - backprop)
