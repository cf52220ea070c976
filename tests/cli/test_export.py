"""`export`: which exit is asked for. Exports themselves are in tests/dist/test_exports.py."""

import pytest
from commands import command

from ds_local.checkpoints import hf_export


@pytest.fixture
def asked(monkeypatch, tmp_path):
    calls = []

    def export(run, output, segment, heads, ema):
        calls.append((run, output, segment, heads, ema))
        return tmp_path / "one"

    def export_all(run, output, heads, ema):
        calls.append((run, output, "all", heads, ema))
        return {0: tmp_path / "segment_0", 1: tmp_path / "segment_1"}

    monkeypatch.setattr(hf_export, "export", export)
    monkeypatch.setattr(hf_export, "export_all", export_all)
    return calls


def test_the_folder_that_was_written_is_said(asked, tmp_path):
    assert command("export", "run", "--output", "out").stdout == f"{tmp_path / 'one'}\n"
    command("export", "run", "--output", "out", "--segment", 0, "--ema")
    command("export", "run", "--output", "out", "--heads")
    assert asked == [
        ("run", "out", None, False, False),
        ("run", "out", 0, False, True),
        ("run", "out", None, True, False),
    ]


def test_all_exits_are_a_folder_each(asked, tmp_path):
    result = command("export", "run", "--output", "out", "--all-segments")
    assert result.stdout.splitlines() == [str(tmp_path / f"segment_{n}") for n in (0, 1)]
    assert asked == [("run", "out", "all", False, False)]


def test_one_exit_and_all_of_them_exclude_each_other(asked):
    result = command("export", "run", "--output", "out", "--segment", 1, "--all-segments")
    assert result.returncode == 2
    assert "not allowed with" in result.stderr
    assert asked == []


def test_a_run_that_is_none_is_a_sentence(tmp_path):
    result = command("export", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert result.returncode != 0
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
