"""The pipelines that are compared: their names, orders and refusals."""

import pytest

from ds_local.errors import ConfigError
from ds_local.measure.sleeping import Times
from ds_local.measure.systems import SYSTEMS, choose, from_torch
from ds_local.schedules.simulator import Costs, simulate


def test_torch_actions_become_a_schedule():
    # two ranks, V: stages 0 and 3 on rank 0, 1 and 2 on rank 1; one micro-batch
    order = {
        0: ["0F0", "3F0", "3I0", "3W0", "", "(0B0;)OVERLAP_F_B"],
        1: ["1F0", "2F0", "2B0", "1B0", "1SEND_F0"],
    }
    schedule = from_torch("V", order)
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


def test_names_choose_whole_or_by_a_part():
    assert [one.name for one in choose(["ds_local:local"])] == ["ds_local:local"]
    assert {one.owner for one in choose(["torch"])} == {"torch"}
    assert choose(None) == list(SYSTEMS)
    assert len({one.name for one in SYSTEMS}) == len(SYSTEMS)
    with pytest.raises(ConfigError, match=r"no system is called 'megatron'; there are ds_local:"):
        choose(["megatron"])


def test_a_prediction_is_that_of_the_simulator():
    times = Times(1.0, 1.0, 1.0)
    by_name = {one.name: one for one in SYSTEMS}
    local, gpipe = by_name["ds_local:local"], by_name["torch:GPipe"]
    assert local.predicted(times, 4, 8, 0.0, None).steady_period == 24
    assert gpipe.predicted(times, 4, 8, 0.0, None).makespan == 24 + 3 * 3
    headed = by_name["ds_local:local, head 10 %"]
    assert headed.predicted(times, 4, 8, 0.0, None).steady_period == pytest.approx(8 * 3.3)
    assert by_name["deepspeed:DualPipeV"].predicted(times, 4, 8, 0.0, None) is None
    assert by_name["async:1F1B, no flush"].predicted(times, 4, 8, 0.0, None) is None


def test_a_mix_needs_as_many_micro_batches_as_its_shares():
    by_name = {one.name: one for one in SYSTEMS}
    assert by_name["ds_local:mixed 1/8"].refuses(4, 7) is not None
    assert by_name["ds_local:mixed 1/8"].refuses(4, 8) is None
    (section,) = by_name["ds_local:mixed 1/4"].arguments(4, 8)
    assert section["mix"][0]["micro_batches"] == 2
    (section,) = by_name["ds_local:interlocking 3"].arguments(2, 8)
    assert section["window"] == 2  # no wider than the pipeline
    (section,) = by_name["ds_local:mixed 1/4, transfer 1"].arguments(4, 8)
    assert section["link"] == {"transfer": 1.0}
