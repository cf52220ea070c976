"""A unit of stages dies alone: its neighbours wait for it and go on, those below lose nothing."""

import contextlib
import json
import math
import re
import signal

import pytest
from fork_client import wait_for
from launch import launch, losses, write_inputs
from lone_units import LONG, Units, dies_in, halts_in

from ds_local.checkpoints.facts import read_facts
from ds_local.checkpoints.gathering import gather_units

STEPS = 16
FOUR = dict.fromkeys(range(4), 1)
LINK = {"reconnect_seconds": 600}


def section(**more):
    return {"local_parallel": {"mode": "local", "num_stages": 4, "link": LINK, **more}}


def of_one_job(config, **layout):
    """The same in one job."""
    own = {**config["local_parallel"], **layout}
    return {**config, "local_parallel": {key: own[key] for key in own if key != "link"}}


def arguments(folder, name, config, steps=STEPS):
    path = folder / f"{name}.json"
    known = json.loads((folder / "ds_config.json").read_text())
    path.write_text(json.dumps({**known, **config}))
    return {
        "--model": str(folder / "model.json"),
        "--data": str(folder / "data"),
        "--deepspeed_config": str(path),
        "--max-steps": str(steps),
        "--eval-every": "4",
        "--eval-sequences": "4",
        "--save-every": "4",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Arguments of one process with all segments, and the losses of its run."""
    one = arguments(folder, "one", of_one_job(section(), num_stages=1, segments_per_stage=4))
    result = launch({**one, "--output": str(folder / "one")}, ranks=1)
    assert result.returncode == 0, result.stdout
    return one, losses(folder / "one")


@contextlib.contextmanager
def units_of(*how):
    units = Units(*how)
    try:
        yield units
    finally:
        units.close()


def differ(units, unit, expected):
    """Rows of a unit that are unlike those of one process."""
    found = units.losses(unit)
    wanted = {key: loss for key, loss in expected.items() if key[2] == unit}
    return {key for key in wanted if found.get(key) != wanted[key]}


def lost(said):
    """unit -> steps that it says it lost."""
    found = re.findall(r"unit (\d) lost \d+ steps: (\d+) to (\d+)", said)
    return {int(unit): range(int(first), int(last) + 1) for unit, first, last in found}


def test_deaths_in_training_in_a_validation_of_the_first_and_the_last(folder, alone, tmp_path):
    """All four die once, each at another place, and are started again."""
    with units_of(arguments(folder, "units", section()), tmp_path / "run", FOUR) as units:
        units.start(0, dies_in("train_batch", 7))
        units.start(1, dies_in("train_batch", 11))
        units.start(2, dies_in("eval_batch", 2))  # the first is before any training
        units.start(3, dies_in("train_batch", 15))
        said = units.keep_up()
        assert [len(run.pids) for run in units.former] == [1] * 4
        assert not differ(units, 0, alone[1])
        missing = lost(said)
        for unit in range(4):
            found = units.losses(unit)
            steps = {step for split, step, _ in found if split == "train"}
            assert steps == set(range(1, STEPS + 1)) - set(missing.get(unit, ())), (unit, said)
            assert found["validation", STEPS, unit] == pytest.approx(
                alone[1]["validation", STEPS, unit], abs=0.2
            )
            assert all(map(math.isfinite, found.values()))
        assert "(stage 1) is back" in said or "(stage 1) is away" not in said


def test_two_neighbours_at_once(folder, alone, tmp_path):
    with units_of(arguments(folder, "units", section()), tmp_path / "run", FOUR) as units:
        units.start(0)
        units.start(1)
        units.start(2, dies_in("train_batch", 7))
        last = units.start(3)
        units.died(2)
        # by its own count it might never die: what it needs for that may have died with unit 2
        last.signal(signal.SIGKILL)
        units.died(3)
        others = [units.runs[unit].pids for unit in (0, 1)]
        units.start(3)
        units.start(2)
        said = units.end()
        assert [units.runs[unit].pids for unit in (0, 1)] == others
        assert not differ(units, 0, alone[1]) | differ(units, 1, alone[1]), said
        assert set(lost(said)) <= {2, 3}
        # as one that is killed while it draws its pictures, when the others have left
        units.start(3)
        units.start(1)
        units.end()


def test_a_request_to_stop_ends_all_units_at_one_step_and_all_go_on(folder, alone, tmp_path):
    one, expected = alone
    run = tmp_path / "run"
    with units_of(arguments(folder, "units", section()), run, FOUR) as units:
        units.start(0, halts_in("train_batch", 7))
        for unit in (1, 2, 3):
            units.start(unit)
        first, third = units.runs[0], units.runs[2]
        assert wait_for(lambda: first.is_stopped(0), LONG), units.said()
        assert wait_for(lambda: ("train", 4, 2) in units.losses(2), LONG), units.said()
        third.signal(signal.SIGTERM)
        assert wait_for(lambda: b"asks to let the run end" in log_of(run, 1), LONG)
        first.signal(signal.SIGCONT)
        said = units.end()
        stops = {int(step) for step in re.findall(r"stopped as asked at step (\d+)", said)}
        assert len(stops) == 1, said
        (stop,) = stops
        assert 6 < stop < STEPS

        gathered = gather_units(run, tmp_path / "whole")
        assert read_facts(gathered)["step"] == stop
        result = launch({**one, "--output": str(tmp_path / "whole")}, "--resume", ranks=1)
        assert result.returncode == 0, result.stdout
        # one job that was stopped where a validation is due goes on without it
        unseen = {key for key in expected if key[:2] == ("validation", stop)}
        found = losses(tmp_path / "whole")
        assert {**{key: expected[key] for key in unseen}, **found} == expected

        for unit in range(4):
            units.start(unit)
        said = units.end()
        assert not any(differ(units, unit, expected) for unit in range(4)), said
        assert not lost(said)


def log_of(run, unit):
    return b"".join(path.read_bytes() for path in (run / f"unit-{unit}" / "logs").glob("*"))


def test_chunks_in_bf16_with_shards_die_and_are_gathered(folder, tmp_path):
    """Units of two stages; one rank of the upper one dies, its launcher ends the other, and the run
    is not asked to stop. Ranks behind the one that waits for another unit wait with it, longer than
    for a rank that is there."""
    precise = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    link = {**LINK, "timeout_seconds": 1.0}
    config = section(mode="chunked", window=2, link=link) | precise
    given, run = arguments(folder, "chunks", config, 6), tmp_path / "run"
    with units_of(given, run, {0: 2, 1: 2}) as units:
        units.start(1, dies_in("train_batch", 6), rank=1)
        assert wait_for(lambda: "is away; waiting for it" in units.said(), LONG)
        units.start(0)
        units.died(1)
        units.start(1)
        said = units.end()
        assert "stopped as asked" not in said
        place = gather_units(run, None)
        assert read_facts(place)["step"] == 6
        assert {
            f"bf16_zero_pp_rank_0_mp_rank_{stage:02d}_optim_states.pt" for stage in range(4)
        } <= {path.name for path in place.iterdir()}
        one = arguments(
            folder, "one-chunks", of_one_job(config, num_stages=2, segments_per_stage=2), 8
        )
        result = launch({**one, "--output": str(run)}, "--resume")
        assert result.returncode == 0, result.stdout
        assert "resuming at step 6; another layout: stages 4, now 2" in result.stdout
