"""What a device shows beside the benchmarks, from what made-up processes say."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from ds_local.measure import gpu_checks

SAID = """..F
FAILED tests/gpu/test_a.py::test_b - assert 1 == 2
ERROR tests/gpu/test_a.py::test_c - no memory
1 failed, 12 passed, 3 skipped, 2 errors in 9.5s
"""


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def run(command, env, **_):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 1, SAID)

    monkeypatch.setattr(gpu_checks.subprocess, "run", run)
    return calls


def args(folder=".", dry_run=False):
    return SimpleNamespace(
        dry_run=dry_run, study_folder=str(folder), study_minutes=1, study_steps=0.5
    )


def test_tests_are_counted_as_pytest_does_and_errors_are_failures(asked, capsys):
    (row,) = gpu_checks.rows_of_tests(args())
    assert (row["passed"], row["failed"], row["skipped"]) == (12, 1 + 2, 3)
    assert [line.split()[0] for line in row["said"]] == ["FAILED", "ERROR"]
    assert row["exit_code"] == 1
    assert "ERROR tests/gpu/test_a.py::test_c" in capsys.readouterr().err
    ((command, environment),) = asked
    assert command[-1] == "tests/gpu"
    assert environment["DS_ACCELERATOR"] == "cuda"


def test_tests_that_cannot_begin_end_nothing_else(monkeypatch):
    silent = subprocess.CompletedProcess([], 4, "")
    monkeypatch.setattr(gpu_checks.subprocess, "run", lambda *_, **__: silent)
    (row,) = gpu_checks.rows_of_tests(args())
    assert row["said"] == ["pytest said nothing and ended with 4"]


def test_a_dry_run_is_short_and_on_the_cpu(asked):
    list(gpu_checks.rows_of_tests(args(dry_run=True)))
    ((command, environment),) = asked
    assert command[-2] == "-k"
    assert environment["DS_ACCELERATOR"] == "cpu"


def test_an_installed_package_has_no_tests(asked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_checks, "CHECKOUT", tmp_path)
    assert list(gpu_checks.rows_of_tests(args())) == []
    assert asked == []
    assert "in a checkout" in capsys.readouterr().err


def finished(method="local", step_factor=0.5):
    result = {"method": method, "segments": 4, "seed": 1, "step_factor": step_factor, "loss": 3.5}
    return result | {"tokens": 10, "seconds": 2.0, "versions": {}, "curve": [[10, 3.5]]}


def test_finished_runs_of_the_study_are_rows(asked, tmp_path):
    for preset in ("gpu-10m", "tiny"):
        (tmp_path / preset / "a").mkdir(parents=True)
        (tmp_path / preset / "a" / "result.json").write_text(json.dumps(finished()))
    (row,) = gpu_checks.rows_of_study(args(tmp_path))
    assert (row["what"], row["preset"], row["loss"]) == ("study", "gpu-10m", 3.5)
    assert "curve" not in row


def test_a_study_out_of_time_says_what_it_lacks_and_how_to_go_on(asked, tmp_path, capsys):
    assert list(gpu_checks.rows_of_study(args(tmp_path))) == []
    said = capsys.readouterr().err
    assert f"it lacks {'; '.join(gpu_checks.METHODS)}. The same command" in said
    assert f"--study-folder ({tmp_path})" in said
    for number, method in enumerate(gpu_checks.METHODS):
        (tmp_path / "gpu-10m" / str(number)).mkdir(parents=True)
        path = tmp_path / "gpu-10m" / str(number) / "result.json"
        path.write_text(json.dumps(finished(method)))
    assert len(list(gpu_checks.rows_of_study(args(tmp_path)))) == len(gpu_checks.METHODS)
    assert "lacks" not in capsys.readouterr().err


def test_runs_of_another_length_do_not_finish_a_study():
    every = [finished(method, 0.25) for method in gpu_checks.METHODS]
    assert gpu_checks.missing_methods(every, args()) == list(gpu_checks.METHODS)
    assert gpu_checks.missing_methods([finished("local")], args())[:2] == ["backprop", "chunked 2"]
