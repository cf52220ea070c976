"""The schedules of other pipelines, as published."""

import pytest

from ds_local.errors import ScheduleError
from ds_local.schedules.peers import PEERS, TITLES, gpipe, interleaved, one_f_one_b
from ds_local.schedules.replay import grid_of, validate
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


def order(schedule):
    return [" ".join(map(str, stage)) for stage in schedule.stages]


def test_two_stages_and_three_micro_batches_by_hand():
    assert order(gpipe(2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2
    assert order(one_f_one_b(2, 3)) == ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]
    assert gpipe(2, 3).peak_live == (3, 3)
    assert one_f_one_b(2, 3).peak_live == (2, 1)


def test_interleaving_goes_through_every_stage_twice():
    schedule = interleaved(2, 2)
    assert schedule.stage_of == (0, 1, 0, 1)
    first = [(a.kind, a.segment, a.micro_batch) for a in schedule.stages[1]]
    assert first[:4] == [("F", 1, 0), ("F", 1, 1), ("F", 3, 0), ("B", 3, 0)]
    assert schedule.message_counts() == {"activations": 6, "gradients": 6}
    # finer pieces leave half of 1F1B's bubble: a piece takes half the time of a stage
    half = simulate(interleaved(2, 8), Costs(0.5, 0.5, 0.5)).makespan - 8 * 3
    assert half == (simulate(one_f_one_b(2, 8), Costs()).makespan - 8 * 3) / 2


def test_interleaving_needs_whole_groups():
    with pytest.raises(ScheduleError, match="in multiples of the 2 stages, got 3"):
        interleaved(2, 3)


def test_every_peer_has_a_title_and_a_valid_order():
    assert PEERS.keys() == TITLES.keys()
    for make in PEERS.values():
        validate(make(3, 6), 4)
