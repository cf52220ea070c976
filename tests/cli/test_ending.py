"""How commands end: by status and by what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from ds_local.cli import ending
from ds_local.errors import ConfigError, TransportError
ending._LATER_SECONDS = 0.0
def main():
    {{body}}
ending.run(main)
"""


def end(body, **environment):
    return subprocess.run(
        [sys.executable, "-c", HEAD.format(body=body)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "1", "LOCAL_RANK": "1"}], ids=["alone", "rank"]
)
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise ConfigError('typ is not a key')", 1, "ConfigError: typ is not a key"),
        ("raise SystemExit(2)", 2, ""),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ],
)  # fmt: skip
def test_ours_are_a_sentence(body, status, said, environment):
    result = end(body, **environment)
    assert (result.returncode, result.stderr.strip()) == (status, said)


def test_one_of_ours_that_came_of_another_error_is_a_sentence_too():
    result = end(
        "try: 1 / 0\n    except ZeroDivisionError as e: raise TransportError('gone') from e"
    )
    assert (result.returncode, result.stderr.strip()) == (1, "TransportError: gone")


@pytest.mark.parametrize("error", ["ZeroDivisionError", "OSError", "RuntimeError", "ValueError"])
def test_anybody_elses_keeps_its_traceback(error):
    result = end(f"raise {error}('of a layer')")
    assert result.returncode == 1
    assert result.stderr.strip().startswith("Traceback (most recent call last)")
    assert result.stderr.strip().endswith(f"{error}: of a layer")
    assert "in main" in result.stderr


def test_the_traceback_is_in_the_log_too(tmp_path):
    result = end(
        f"from pathlib import Path; from ds_local.links.logs import start_log; "
        f"start_log(Path({str(tmp_path)!r}), 1, 3); raise ValueError('of a layer')"
    )
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    log = (tmp_path / "rank-003.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "ValueError: of a layer" in log


def test_a_reader_that_leaves_is_no_error_to_tell():
    body = "print('x' * 10_000_000)"
    command = f'{sys.executable} -c "$CODE" | head -c 1'
    result = subprocess.run(
        ["bash", "-c", command],
        check=False,
        capture_output=True,
        text=True,
        env={"CODE": HEAD.format(body=body), "PATH": "/usr/bin:/bin"},
        timeout=120,
    )
    assert (result.stdout, result.stderr) == ("x", "")
