"""The campaign that kills single stages, on jobs that only count."""

import sys

import pytest

from ds_local.measure.fleet import Fleet, Job, lost_steps, train_words
from ds_local.measure.stage_alone import (
    disturbed,
    equal_below,
    losses,
    stands_still,
)
from ds_local.measure.stage_alone_page import page, picture

# counts to the last step, from where an earlier start of it was, half as lossy as its number says
COUNTS = """
import json, sys, time
from pathlib import Path
path, last, factor = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
path.parent.mkdir(exist_ok=True)
done = len(path.read_text().splitlines()) if path.exists() else 0
if done:
    print(f"unit 0 lost 2 steps: {done + 1:,} to {done + 2:,}", flush=True)
for step in range(done + 1, last + 1):
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "split": "train", "loss": step * factor}) + "\\n")
    time.sleep(0.02)
"""
STEPS = 60


@pytest.fixture
def jobs(tmp_path):
    def make(factor=0.5, names=("unit-0", "unit-1")):
        folder = tmp_path / str(factor)
        folder.mkdir()
        made = {}
        for name in names:
            metrics = folder / name / "metrics.jsonl"
            words = [sys.executable, "-c", COUNTS, str(metrics), str(STEPS), str(factor)]
            made[name] = Job(name, words, metrics, folder)
        return Fleet(made)

    return make


def test_killed_jobs_come_back_and_no_other_ends(jobs):
    fleet = jobs()
    found = disturbed(fleet, STEPS, kills=3, seed=1, most=60.0)
    assert 1 <= len(found["kills"]) <= 3
    assert found["other_ends"] == 0
    assert all(kill["outage_seconds"] >= 0 for kill in found["kills"])
    assert lost_steps(fleet) == 2 * len(found["kills"])
    assert all(job.is_done and len(losses(job)) == STEPS for job in fleet.jobs.values())
    assert sum(job.starts for job in fleet.jobs.values()) == 2 + len(found["kills"])


def test_losses_below_the_first_death_are_compared(jobs):
    quiet, other = jobs(0.5), jobs(0.25)
    for fleet in (quiet, other):
        with fleet:
            while not fleet.look():
                pass
    killed = [{"job": "unit-1", "step": 31}]
    compared = STEPS + 20  # all of the lowest unit, of the next one those before its death
    for fleet, equal in ((quiet, compared), (other, 0)):
        found = equal_below(quiet, fleet, killed, saves=10)
        assert found == {"losses_compared": compared, "losses_equal": equal}


def test_a_copy_stands_still_from_the_dead_stage_on():
    killed = [
        {"job": "unit-0-replica-1", "outage_seconds": 10.0},  # three stages
        {"job": "unit-2-replica-0", "outage_seconds": 6.0},  # one
        {"job": "unit-1-replica-0"},  # not back by the end
    ]
    assert stands_still(3, killed) == (10 * 3 + 6 * 1) / 2


def test_a_fleet_leaves_no_job_behind(jobs):
    with jobs() as fleet:
        processes = [job.process for job in fleet.jobs.values()]
    assert all(process.poll() is not None for process in processes)


def test_words_of_a_job():
    words = train_words(output="run", max_steps=5, resume=True, deepspeed_config="ds.json")
    assert words[1:] == [
        "-m",
        "ds_local",
        "train",
        "--output",
        "run",
        "--max-steps",
        "5",
        "--resume",
        "--deepspeed_config",
        "ds.json",
    ]


def test_the_page_has_a_line_for_each_layout():
    row = {
        "layout": "4 x 1",
        "date": "2026-11-26",
        "machine": "2 CPU cores",
        "steps": 100,
        "saves_every": 10,
        "depth": 4,
        "quiet_seconds": 50.0,
        "train_seconds": 60.0,
        "kills": [{"job": "unit-1", "step": 20, "at": 9.0, "outage_seconds": 5.5}],
        "other_ends": 0,
        "lost_steps": 3,
        "lost_stage_seconds": 41.5,
        "losses_compared": 10,
        "losses_equal": 10,
        "validation": {"unit-0": [2.0, 2.5]},
        "curves": [[[0, 5.0], [100, 2.0]], [[0, 5.0], [100, 2.5]]],
        "restart_all": {"kills": 2, "lost_stage_seconds": 90.25},
    }
    text = page([row, {**row, "layout": "3 x 2", "restart_all": None}])
    assert "| 4 x 1, 4 | 1 | 0 | 5.5, 5.5 | 3 | 41.5 | 90.2 (2 kills) |" in text
    assert "| 3 x 2, 4 | 1 | 0 | 5.5, 5.5 | 3 | 41.5 | - |" in text
    assert "10 of 10 losses equal" in text
    assert picture(row).startswith("<svg")
