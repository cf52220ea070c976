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


def test_tests_are_counted_as_pytest_does_and_errors_are_failures(asked):
    (row,) = gpu_checks.rows_of_tests(args())
    assert (row["passed"], row["failed"], row["skipped"]) == (12, 1 + 2, 3)
    assert [line.split()[0] for line in row["said"]] == ["FAILED", "ERROR"]
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


def test_finished_runs_of_the_study_are_rows(asked, tmp_path):
    result = {"method": "local", "segments": 4, "seed": 1, "loss": 3.5, "tokens": 10}
    result |= {"seconds": 2.0, "versions": {}, "curve": [[10, 3.5]]}
    for preset in ("gpu-10m", "tiny"):
        (tmp_path / preset / "a").mkdir(parents=True)
        (tmp_path / preset / "a" / "result.json").write_text(json.dumps(result))
    (row,) = gpu_checks.rows_of_study(args(tmp_path))
    assert (row["what"], row["preset"], row["loss"]) == ("study", "gpu-10m", 3.5)
    assert "curve" not in row
