"""The schedules of other pipelines, as published."""

import pytest

from ds_local.schedules.peers import PEERS
from ds_local.schedules.replay import grid_of
from ds_local.schedules.schedule import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
)
from ds_local.schedules.simulator import Costs, simulate


@pytest.mark.parametrize("name", PEERS)
def test_golden_grid_of_peers(name, golden):
    golden(f"peer_{name}_p4_m8.txt", grid_of(PEERS[name](4, 8)))


def test_backpropagation_split_is_zero_bubble():
    """ZB-H1 has the paper's order on every stage that has somebody waiting below; ZB-H2 its memory
    and no bubble."""
    ours = PEERS["zero_bubble"](4, 8)
    assert list(ours.stages[1:]) == zero_bubble_of_the_paper(4, 8)[1:]
    assert simulate(ours, Costs()).steady_period == 8 * 3 + 3
    for stages in (2, 3, 4, 6):
        for micro_batches in (2 * stages - 1, 3 * stages):
            more = PEERS["zero_bubble_2"](stages, micro_batches)
            assert max(more.peak_live) == 2 * stages - 1
            assert simulate(more, Costs()).steady_period == 3 * micro_batches


def zero_bubble_of_the_paper(num_stages, num_micro_batches):
    """ZB-H1: stage s computes the weight gradient of a micro-batch s input gradients later."""
    stages = []
    for stage in range(num_stages):
        ahead = min(num_micro_batches, num_stages - stage)
        actions = [Action(FORWARD, stage, m) for m in range(ahead)]
        for m in range(num_micro_batches):
            actions.append(Action(INPUT_GRADIENT, stage, m))
            if m >= stage:
                actions.append(Action(WEIGHT_GRADIENT, stage, m - stage))
            if m + ahead < num_micro_batches:
                actions.append(Action(FORWARD, stage, m + ahead))
        actions += [
            Action(WEIGHT_GRADIENT, stage, m)
            for m in range(max(0, num_micro_batches - stage), num_micro_batches)
        ]
        stages.append(tuple(actions))
    return stages
