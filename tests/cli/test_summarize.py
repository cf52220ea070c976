"""`summarize`: a table and a picture of a run folder."""

import json

from commands import command
from sentences import assert_one_sentence


def row(step, segment, split="train", **more):
    return {
        "step": step,
        "segment": segment,
        "stage": segment,
        "split": split,
        "loss": 3.0 - step / 10,
        "has_loss": True,
        "tokens": step * 100,
        "seconds": float(step),
        "idle_share": 0.25,
        "step_seconds": 1.0,
        **more,
    }


def test_a_run_is_a_table_and_a_picture(tmp_path):
    rows = [row(step, segment) for step in (1, 2) for segment in (0, 1)]
    rows += [row(2, segment, "validation") for segment in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    result = command("summarize", tmp_path)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[1].split()[:3] == ["0", "0", "2.8000"]
    assert f"loss curves: {tmp_path / 'loss.png'}" in lines[-1]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_whose_folder_cannot_be_written_to_has_its_table(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1, 0)) + "\n")
    (tmp_path / "loss.png").mkdir()  # no file can take this place
    (tmp_path / "loss.png" / "mine").touch()
    result = command("summarize", tmp_path)
    assert result.returncode == 1
    assert "1 steps, 100 tokens" in result.stdout
    assert_one_sentence(result.stderr.strip(), f"cannot write {tmp_path / 'loss.png'}")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    result = command("summarize", tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"no metrics in {tmp_path}; is it a run folder?\n"
    assert not (tmp_path / "loss.png").exists()


def test_a_mistyped_option_is_one_sentence(tmp_path):
    for verb in (["summarize", tmp_path], ["benchmark", "table", "rows.json"]):
        result = command(*verb, "--pgn")
        assert result.returncode == 2
        assert_one_sentence(result.stderr.strip(), "--pgn", "see --help")
