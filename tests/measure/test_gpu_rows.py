"""Which rows of an earlier call stand, and which are made anew."""

from types import SimpleNamespace

import pytest
import torch

from ds_local.measure.gpu_checks import METHODS
from ds_local.measure.gpu_rows import has_failed_tests, is_done, merged, rows_of

TESTS = {"task": "tests", "what": "tests", "passed": 12, "failed": 0, "dry_run": False}
RUN = {"task": "study", "what": "study", "preset": "gpu-10m", "segments": 4, "seed": 1}
RUN |= {"step_factor": 0.25, "dry_run": False, "loss": 3.0}
STUDY = [{**RUN, "method": method} for method in METHODS]


def asked(dry_run=False, study_steps=0.25, parts=("tests", "study")):
    return SimpleNamespace(dry_run=dry_run, study_steps=study_steps, parts=parts)


@pytest.mark.parametrize(("task", "rows"), [("tests", [TESTS]), ("study", STUDY)])
def test_a_dry_run_stands_for_no_real_one(task, rows):
    assert is_done(task, rows, asked())
    assert not is_done(task, rows, asked(dry_run=True))
    dry = [{**row, "dry_run": True} for row in rows]
    assert is_done(task, dry, asked(dry_run=True))
    assert not is_done(task, dry, asked())


def test_rows_of_older_files_say_it_in_their_command():
    row = {name: value for name, value in TESTS.items() if name != "dry_run"}
    assert is_done("tests", [{**row, "command": "benchmark.py gpu"}], asked())
    dry = {**row, "command": "benchmark.py gpu --dry-run --json x"}
    assert not is_done("tests", [dry], asked())
    assert is_done("tests", [dry], asked(dry_run=True))


@pytest.mark.parametrize("wrong", [{"failed": 1}, {"passed": 0}, {"exit_code": 2}])
def test_tests_that_failed_are_done_again_and_said(wrong):
    row = TESTS | wrong
    assert not is_done("tests", [row], asked())
    assert has_failed_tests([row], asked())
    assert not has_failed_tests([row], asked(parts=["heads"]))
    assert not has_failed_tests([row], asked(dry_run=True))
    assert merged([row], [TESTS]) == [TESTS]
    assert not has_failed_tests([TESTS], asked())


def test_a_study_is_done_with_its_last_method():
    assert not is_done("study", STUDY[:-1], asked())
    assert not is_done("study", STUDY, asked(study_steps=0.5))
    assert not is_done("study", [], asked())
    dry = [{**STUDY[0], "preset": "tiny", "dry_run": True}]
    assert is_done("study", dry, asked(dry_run=True))


def test_newer_runs_of_a_study_replace_the_same_ones_only():
    again = {**STUDY[0], "loss": 2.0}
    longer = {**STUDY[0], "step_factor": 0.5}
    found = merged([TESTS, *STUDY], [again, longer])
    assert found == [TESTS, *STUDY[1:], again, longer]


def test_other_tasks_are_done_with_a_row_and_stay():
    row = {"task": "tiny whole False", "what": "whole model", "dry_run": True}
    assert is_done("tiny whole False", [row], asked(dry_run=True))
    assert not is_done("tiny whole True", [row], asked(dry_run=True))
    assert merged([row], [TESTS]) == [row, TESTS]


def test_what_does_not_fit_ends_no_other_task(capsys):
    def run():
        yield {"what": "head", "seconds": 0.5}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it")

    assert rows_of("heads", run, asked()) == [
        {"task": "heads", "dry_run": False, "what": "head", "seconds": 0.5}
    ]
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "heads does not fit: CUDA out of memory. Tried to allocate 2 GiB."
    with pytest.raises(ZeroDivisionError):
        rows_of("heads", lambda: [{"what": 1 / 0}], asked())
