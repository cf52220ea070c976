"""Who starts a unit of stages again: torchrun's agent, and the loop of a Slurm step."""

import json
import os
import signal
import subprocess
import sys

import pytest
from fork_client import environment, is_alive, wait_for
from launch import ROOT, launch, losses, write_inputs
from lone_units import LONG, Units, halts_in

SCRIPTS = ROOT / "scripts" / "launch"
STEPS = 9
LOCAL = {"mode": "local", "num_stages": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs of two units, and the run of one process with both segments."""
    folder = tmp_path_factory.mktemp("supervised")
    inputs = write_inputs(folder, local_parallel={**LOCAL, "link": {"reconnect_seconds": 600}})
    one = json.loads((folder / "ds_config.json").read_text())
    one["local_parallel"] = {"mode": "local", "num_stages": 1, "segments_per_stage": 2}
    (folder / "one.json").write_text(json.dumps(one))
    arguments = {**inputs, "--deepspeed_config": str(folder / "one.json")}
    more = ["--max-steps", str(STEPS), "--eval-every", "4", "--save-every", "4"]
    result = launch({**arguments, "--output": str(folder / "one")}, *more, ranks=1)
    assert result.returncode == 0, result.stdout
    return folder


def job(folder, run, **more):
    """Environment of the launch scripts."""
    named = {"MODEL": "model.json", "DATA": "data", "CONFIG": "ds_config.json"}
    return {
        **environment(),
        **{name: str(folder / file) for name, file in named.items()},
        "RUN": str(run),
        "STEPS": str(STEPS),
        "STAGES": "2",
        **more,
    }


def workers(pid):
    """Processes of train.py below one."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                above = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{entry}/cmdline") as file:
                words = file.read().split("\0")
        except OSError:
            continue
        if above == pid and "scripts/train.py" in words and is_alive(int(entry)):
            found.append(int(entry))
    return found


@pytest.mark.slow
def test_torchrun_starts_a_killed_unit_again(folder, tmp_path):
    """The lower unit is halted meanwhile, so the upper one is killed in the middle of the run."""
    run = tmp_path / "run"
    more = ["--eval-every", "4", "--save-every", "4"]
    below = {
        "--model": str(folder / "model.json"),
        "--data": str(folder / "data"),
        "--deepspeed_config": str(folder / "ds_config.json"),
        "--max-steps": str(STEPS),
        "--num-stages": "2",
        "--eval-every": "4",
        "--save-every": "4",
    }
    units = Units(below, run, {0: 1})
    said = tmp_path / "agent.txt"
    agent = subprocess.Popen(
        ["bash", str(SCRIPTS / "unit.sh"), *more],
        env=job(folder, run, UNIT="1", RESTARTS="3"),
        stdout=said.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        lower = units.start(0, halts_in("train_batch", 7))
        assert wait_for(lambda: lower.is_stopped(0), LONG), units.said()
        log = run / "unit-1" / "metrics.jsonl"
        assert wait_for(lambda: log.exists() and '"step": 4' in log.read_text(), LONG)
        (worker,) = workers(agent.pid)
        os.kill(worker, signal.SIGKILL)
        lower.signal(signal.SIGCONT)
        units.end()
        assert agent.wait(LONG) == 0, said.read_text()
    finally:
        units.close()
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    assert "resuming at step 4" in said.read_text()
    starts = json.loads((run / "unit-1" / "run.json").read_text())["starts"]
    assert len({start["pid"] for start in starts}) == len(starts) == 2
    assert len(json.loads((run / "unit-0" / "run.json").read_text())["starts"]) == 1
    expected = losses(folder / "one")
    assert units.losses(0) == {key: loss for key, loss in expected.items() if key[2] == 0}
    assert ("train", STEPS, 1) in units.losses(1)


# --- again.sh -------------------------------------------------------------------------------------

COMMAND = """#!/bin/sh
echo start >> "$STARTS"
[ "$(wc -l < "$STARTS")" -gt "$FAILS" ] || exit 7
"""


def again(tmp_path, fails, limit, script=COMMAND):
    (tmp_path / "starts").write_text("")
    (tmp_path / "command").write_text(script)
    return subprocess.Popen(
        ["bash", str(SCRIPTS / "again.sh"), "sh", str(tmp_path / "command")],
        env={
            **os.environ,
            "STARTS": str(tmp_path / "starts"),
            "FAILS": str(fails),
            "STARTS_PER_HOUR": str(limit),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def starts(tmp_path):
    return (tmp_path / "starts").read_text().count("start")


def test_a_command_that_ends_badly_is_started_again_until_it_ends_well(tmp_path):
    process = again(tmp_path, fails=3, limit=20)
    _, said = process.communicate(timeout=LONG)
    assert (process.returncode, starts(tmp_path), said) == (0, 4, "")


def test_not_more_often_than_so_many_times_an_hour(tmp_path):
    process = again(tmp_path, fails=100, limit=3)
    _, said = process.communicate(timeout=LONG)
    assert (process.returncode, starts(tmp_path)) == (1, 3)
    assert "ended badly 3 times within an hour, so it is not started again: sh" in said


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_that_is_told_to_end_is_not_started_again(tmp_path, status):
    waits = f'trap "exit {status}" TERM; echo start >> "$STARTS"; while :; do sleep 0.05; done'
    process = again(tmp_path, fails=0, limit=20, script=waits)
    assert wait_for(lambda: starts(tmp_path) == 1, LONG)
    process.terminate()
    process.communicate(timeout=LONG)
    assert (process.returncode, starts(tmp_path)) == (0, 1)


def test_it_may_be_told_in_the_moment_of_a_start(tmp_path):
    """The command's first act is to tell it, which may be before the shell goes on."""
    tells = 'trap "exit 1" TERM; echo start >> "$STARTS"; kill -TERM $PPID; while :; do :; done'
    for _ in range(10):
        process = again(tmp_path, fails=0, limit=20, script=tells)
        process.communicate(timeout=LONG)
        assert (process.returncode, starts(tmp_path)) == (0, 1)


# --- a job of Slurm's -----------------------------------------------------------------------------

SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
exec "$@"
"""
STEP = """#!/bin/sh
# stands for python: unit 1 ends badly once
echo "$UNIT" >> "$STARTS"
[ "$UNIT" = 1 ] && [ "$(grep -c 1 "$STARTS")" = 1 ] && exit 1
exit 0
"""


def slurm(tmp_path, folder, python, **more):
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "python": python}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    known = job(folder, tmp_path / "run", SLURM_SUBMIT_DIR=str(ROOT), UNITS="2", **more)
    return subprocess.Popen(
        ["bash", str(SCRIPTS / "units.sbatch"), "--save-every", "4", "--eval-every", "4"],
        env={**known, "PATH": f"{tmp_path / 'bin'}:{known['PATH']}"},
        stdout=(tmp_path / "said").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_a_step_that_ends_badly_is_started_again(folder, tmp_path):
    process = slurm(tmp_path, folder, STEP, STARTS=str(tmp_path / "starts"))
    assert process.wait(LONG) == 0, (tmp_path / "said").read_text()
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "1", "1"]


@pytest.mark.slow
def test_a_killed_step_of_a_real_run(folder, tmp_path):
    """The lower unit begins when the upper one has died once."""
    go, run = tmp_path / "go", tmp_path / "run"
    waits = f'while [ "$UNIT" = 0 ] && [ ! -e {go} ]; do sleep 0.1; done\n'
    process = slurm(tmp_path, folder, f'#!/bin/sh\n{waits}exec {sys.executable} "$@"\n')
    facts = [run / f"unit-{unit}" / "run.json" for unit in (0, 1)]
    try:
        assert wait_for(facts[1].exists, LONG), (tmp_path / "said").read_text()
        os.kill(json.loads(facts[1].read_text())["starts"][-1]["pid"], signal.SIGKILL)
        go.touch()
        assert process.wait(LONG) == 0, (tmp_path / "said").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert [len(json.loads(path.read_text())["starts"]) for path in facts] == [1, 2]
    found = losses(run / "unit-0") | losses(run / "unit-1")
    assert found == losses(folder / "one")
