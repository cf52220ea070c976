"""Schedules as files: written, read back, read from torch, and what is refused."""

import pytest
import torch_sheets
from schedule_rows import schedule_of

from ds_local.config.catalog import SCHEMES, section_of
from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError, ScheduleError
from ds_local.schedules.replay import grid_of
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Action
from ds_local.schedules.sheets import csv_of, placement_in, read_schedule

DEPTH = 4
TWO = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def backprop(stages, micro_batches, segments=None, split=0):
    row = ("backprop", None, micro_batches)
    return schedule_of(row, stages=stages, segments=segments, split=split)


def plan_of(section, stages, micro_batches, **more):
    section = section_of(section, micro_batches) | more
    return RunPlan(local_parallel({"local_parallel": section}), stages, micro_batches)


def test_a_row_is_a_stage_and_a_cell_an_action(tmp_path):
    own = backprop(2, 2)
    assert csv_of(own) == TWO
    path = tmp_path / "order.csv"
    path.write_text("0F0,0F1,,0B0,0B1\n,1F0,1F1,1B0,1B1\n")
    found = read_schedule(path, own, DEPTH)
    assert found.stages[0] == own.stages[0]
    kinds = [("F", 0), ("F", 1), ("B", 0), ("B", 1)]
    assert found.stages[1] == tuple(Action(kind, 1, m) for kind, m in kinds)
    assert own.peak_live == (2, 1)
    assert found.peak_live == (2, 2)


@pytest.mark.parametrize("per_stage", [1, 2])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_written_and_read_back_equal(name, per_stage, tmp_path):
    stages = 1 if name == "data parallel" else 4
    plan = plan_of(SCHEMES[name].section, stages, 8, segments_per_stage=per_stage)
    for schedule in plan.schedules:
        for suffix, text in ((".csv", csv_of(schedule)), (".txt", grid_of(schedule))):
            path = tmp_path / f"order{suffix}"
            path.write_text(text)
            if suffix == ".csv" or not schedule.leads:
                assert read_schedule(path, schedule, DEPTH) == schedule


def test_a_pass_is_named_where_several_hand_gradients_through():
    cells = csv_of(schedule_of(("interlocking", 4, 2), stages=6)).splitlines()[2].split(",")
    assert cells == ["2F0", "2F1", "2I0", "2I1", "2I0/1", "2I1/1", "2B0", "2B1"]
    assert "/" not in csv_of(schedule_of(("interlocking", 3, 2), stages=4))


def test_torch_reads_ours(tmp_path):
    from torch.distributed.pipelining import schedules as theirs

    for split in (0, 1, 2):
        own = backprop(4, 8, split=split)
        rows = [line.split(",") for line in csv_of(own).splitlines()]
        actions = {n: [theirs._Action.from_str(cell) for cell in row] for n, row in enumerate(rows)}
        if split:  # torch has two halves on its first stage too
            for one in list(actions[0]):
                if one.computation_type == theirs.B:
                    at = actions[0].index(one)
                    halves = (one._replace(computation_type=kind) for kind in (theirs.I, theirs.W))
                    actions[0][at : at + 1] = halves
        assert theirs._validate_schedule(actions, 4, 4, 8) == {0: 0, 1: 1, 2: 2, 3: 3}
        whole = theirs._add_send_recv(actions, lambda stage: stage, 4)
        assert theirs._simulate_comms_compute(whole, lambda stage: stage, 4)


@pytest.mark.parametrize("comms", [False, True], ids=["compute", "with transfers"])
@pytest.mark.parametrize("name", torch_sheets.PLACEMENTS)
def test_torch_writes_ours(name, comms, tmp_path):
    path = tmp_path / "order.csv"
    torch_sheets.write(name, 2, 4, path, comms)
    own = backprop(2, 4, segments=4)
    found = read_schedule(path, own, DEPTH)
    held = [torch_sheets.PLACEMENTS[name](rank, 2) for rank in range(2)]
    assert [[s for s, at in enumerate(found.stage_of) if at == r] for r in range(2)] == held
    assert placement_in(path, 2, 4) == found.stage_of
    segments = {action.segment for action in found.actions()}
    assert segments == {0, 1, 2, 3}
    # the first segment sends nothing down, so its backward is whole
    assert {a.kind for a in found.actions() if a.segment == 0} == {"F", "B"}


WRONG = {
    "double": ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1,1B1\n", ["stage 1, 1B1", "twice", "[1B1] [1B1]"]),
    "missing": ("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n", ["1 actions are missing: 0B1", "0F0 0F1 0B0"]),
    "too early": (
        "0F0,0F1,0B0,0B1\n1B0,1F0,1F1,1B1\n",
        ["comes before what it needs", "stage 1 waits for the inputs of B0", "[1B0] 1F0"],
    ),
    "crossed": (
        "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
        ["stage 0 waits for the inputs of B0", "0F0 [0B0] 0F1", "1F0 [1F1] 1B0"],
    ),
    "a stranger": ("0F0,0F1,0B0,0X1\n1F0,1B0,1F1,1B1\n", ["stage 0, cell 4", "'0X1'", "as in 2F0"]),
    "a micro-batch": (TWO.replace("1F1", "1F7"), ["stage 1, 1F7", "numbered from 0 to 1"]),
    "two stages": (TWO.replace("1F1", "0F1"), ["stage 1, 0F1", "segment 0 is on stage 0 too"]),
    "rows": (TWO + "2F0\n", ["has 3 rows", "there are 2 stages"]),
    "upside down": ("1F0,1B0,1F1,1B1\n0F0,0F1,0B0,0B1\n", ["segment 0 is on stage 1"]),
    "uneven": ("0F0,0F1,2F0,0B0,0B1\n1F0,1B0,1F1,1B1\n", ["[[0, 2], [1]]", "segments_per_stage"]),
    "half a backward": (
        TWO.replace("1B1", "1I1"),
        ["stage 1, 1I1", "its other half, 1W1, is missing"],
    ),
    "no such half": (TWO.replace("0B1", "0I1"), ["stage 0, 0I1", "sends no gradient down"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_with_the_place(wrong, tmp_path):
    text, phrases = WRONG[wrong]
    path = tmp_path / "order.csv"
    path.write_text(text)
    with pytest.raises(ScheduleError) as refusal:
        read_schedule(path, backprop(2, 2), DEPTH)
    assert str(path) in str(refusal.value)
    for phrase in phrases:
        assert phrase in str(refusal.value)


def test_a_schedule_that_links_are_too_short_for_is_refused(tmp_path):
    """Stage 0 takes no gradient before its last forward, and stage 1 no forward before it has
    sent off the gradient of the one before."""
    path = tmp_path / "order.csv"
    numbers = range(6)
    path.write_text(
        ",".join([*(f"0F{n}" for n in numbers), *(f"0B{n}" for n in numbers)])
        + "\n"
        + ",".join(f"1F{n},1B{n}" for n in numbers)
    )
    assert read_schedule(path, backprop(2, 6), DEPTH).peak_live == (6, 1)
    with pytest.raises(ScheduleError, match=r"deadlock.*links hold 1 messages, raise link.depth"):
        read_schedule(path, backprop(2, 6), 1)


def test_the_plan_takes_files_in_place_of_its_own_schedules(tmp_path):
    path = tmp_path / "order.csv"
    path.write_text(TWO.replace("1F0,1B0,1F1,1B1", "1F0,1F1,1B0,1B1"))
    plan = plan_of({"mode": "backprop"}, 2, 2, schedule=str(path))
    assert plan.schedule_at(5).peak_live == (2, 2)
    assert f"schedule of {path}: live micro-batches by stage 2, 2" in plan.notes
    with pytest.raises(ConfigError, match="names 1 files, but the run has 2 schedules"):
        _ = plan_of({"mode": "shifted_chunked"}, 2, 2, schedule=str(path)).schedules
    torch_sheets.write("ZBVZeroBubble", 2, 2, path)
    with pytest.raises(ConfigError, match=r"set local_parallel.split_backward to 1"):
        _ = plan_of({"mode": "backprop"}, 2, 2, schedule=str(path), segments_per_stage=2).schedules


def test_schedules_that_follow_each_other_have_a_file_each(tmp_path):
    own = plan_of({"mode": "shifted_chunked"}, 4, 4)
    paths = [tmp_path / f"{n}.csv" for n in range(2)]
    for path, schedule in zip(paths, own.schedules, strict=True):
        path.write_text(csv_of(schedule))
    given = plan_of({"mode": "shifted_chunked"}, 4, 4, schedule=list(map(str, paths)))
    assert given.schedules == own.schedules


def test_forwards_that_run_ahead_keep_their_stages(tmp_path):
    own = plan_of({"mode": "backprop", "run_ahead": "auto"}, 2, 4).schedules[0]
    path = tmp_path / "order.txt"
    path.write_text(csv_of(own))
    with pytest.raises(ScheduleError, match="0 rows"):
        read_schedule(path, own, DEPTH)
    assert "0F0+" in csv_of(own)
