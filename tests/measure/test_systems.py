"""The pipelines that are compared: their names, orders and refusals."""

from ds_local.measure.systems import choose, from_torch
from ds_local.schedules.simulator import Costs, simulate


def test_torch_actions_become_a_schedule():
    # two ranks, V: stages 0 and 3 on rank 0, 1 and 2 on rank 1; one micro-batch
    order = {
        0: ["0F0", "3F0", "3I0", "3W0", None, "(0B0;)OVERLAP_F_B"],
        1: ["1F0", "2F0", "2B0", "1B0", "1SEND_F0"],
    }
    schedule = from_torch("V", {rank: list(map(str, actions)) for rank, actions in order.items()})
    assert schedule.stage_of == (0, 1, 1, 0)
    assert schedule.peak_live == (2, 2)
    timeline = simulate(schedule, Costs())
    # forwards 0 1 2 3, then 3I, 2B, 1B, 0B on the way back
    assert timeline.makespan == 4 + 1 + 2 + 2 + 2
    assert timeline.busy == [6, 6]


def test_systems_that_cannot_run_say_why():
    dualpipev = choose(["torch:DualPipeV"])[0]
    assert dualpipev.refuses(4, 7) == "torch:DualPipeV needs at least 8 micro-batches at 4 stages"
    assert dualpipev.refuses(4, 8) is None
