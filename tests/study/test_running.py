"""Runs of the study, trained with a model of next to no size."""

import fcntl
import json

import numpy as np
import pytest
from study_runs import run_of

from ds_local.cli import study
from ds_local.study import running
from ds_local.study.recipes import PRESETS, TRIAL
from ds_local.study.running import result_of, thin_out
from ds_local.study.runs import Run

TAIL = "local, backprop tail 40 %"


def lines(place, until):
    rows = map(json.loads, (place / "run" / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["segment"], r["loss"]) for r in rows if r["step"] <= until]


def row_of(step, segment, split="validation"):
    row = {"step": step, "segment": segment, "split": split, "tokens": 100 * step}
    return row | {"loss": 5 - step / 1000 + segment / 10, "seconds": step / 2}


FACTS = {
    "layout": {"segment_parts": [0, 3, 6]},
    "versions": {"torch": "2"},
    "machine": {"device": "cpu"},
    "data": {"fingerprint": "abc"},
}


def test_a_result_is_of_the_last_segment_and_its_exits():
    run = run_of("local", segments=2)
    rows = [row_of(step, segment) for step in (1500, 3000) for segment in (0, 1)]
    result = result_of(run, [*rows, row_of(3000, 0, "train")], FACTS)
    assert result["curve"] == [(150_000, 3.6), (300_000, 2.1)]
    assert (result["loss"], result["exits"]) == (2.1, {0: 2.0, 1: 2.1})
    assert (result["tokens"], result["seconds"], result["parts"]) == (300_000, 1500.0, [0, 3, 6])
    assert {field: result[field] for field in Run._fields} == run._asdict()


def test_a_renewed_run_has_no_curve_from_before():
    run = run_of("first chunk alone, rest fresh, backprop tail 40 %, WSD", segments=2)
    rows = [row_of(step, 1) for step in (1500, 1800, 2100, 3000)]
    assert [tokens for tokens, _ in result_of(run, rows, FACTS)["curve"]] == [210_000, 300_000]


def test_a_run_that_another_process_trains_is_not_called_finished(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(running, "prepared", lambda *_: tmp_path)
    run = Run(TRIAL, "local", 4, 1, 1.0, 1.0)
    place = tmp_path / "study" / TRIAL / run.name
    place.mkdir(parents=True)
    asked = ["run", "--preset", TRIAL, "--methods", "local", "--folder", str(tmp_path / "study")]
    with (place / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert study.main([*asked, "--segments", "4", "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    assert f"another process trains {run.name}; call again" in said
    assert "finished" not in said


@pytest.mark.parametrize(
    ("method", "kept"),
    [("local", {900, 1800, 2100, 2400, 2700, 2850, 3000}), ("local, backprop tail 40 %", {3000})],
)
def test_checkpoints_that_no_run_begins_with_are_removed(tmp_path, method, kept):
    for step in range(150, 3001, 150):
        (tmp_path / f"global_step{step}").mkdir()
    thin_out(run_of(method), tmp_path)
    assert {int(path.name.removeprefix("global_step")) for path in tmp_path.iterdir()} == kept


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_trained_once_and_its_tail_goes_on_from_it(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcde"), 3)) for _ in range(16_000)]
    lines_of_text = (" ".join(words[i : i + 40]) for i in range(0, len(words), 40))
    (tmp_path / "text.txt").write_text("\n".join(lines_of_text))
    preset = PRESETS[TRIAL]
    small = preset._replace(
        source=str(tmp_path / "text.txt"),
        tokenizer="sentencepiece:320",
        model={**preset.model, "vocab_size": 320},
    )
    monkeypatch.setitem(PRESETS, TRIAL, small)
    monkeypatch.chdir(tmp_path)
    command = ["run", "--preset", TRIAL, "--minutes", "12", "--methods", "local", TAIL]
    assert study.main(command) == 0
    assert "all of these runs are finished" in capsys.readouterr().out
    trunk, tail = sorted((tmp_path / "out" / "study" / TRIAL).iterdir(), key=lambda p: len(p.name))
    assert "resuming at step 12" in (tail / "log.txt").read_text()
    assert lines(tail, 12) == lines(trunk, 12)
    assert lines(tail, 20) != lines(trunk, 20)
    results = [json.loads((place / "result.json").read_text()) for place in (trunk, tail)]
    for result, place in zip(results, (trunk, tail), strict=True):
        assert result["loss"] == result["curve"][-1][1] == lines(place, 20)[-1][2]
        assert result["tokens"] == 20 * small.step_tokens
        assert [tokens for tokens, _ in result["curve"]] == [512 * i for i in range(1, 11)]
    steps = {path.name for path in (trunk / "run" / "checkpoints").glob("global_step*")}
    assert steps == {f"global_step{step}" for step in (6, 12, 16, 18, 19, 20)}
    written = (trunk / "result.json").stat().st_mtime_ns
    assert study.main(command) == 0
    assert (trunk / "result.json").stat().st_mtime_ns == written
    assert study.main(["table"]) == 1  # trials do not count
    assert "no backprop run is finished" in capsys.readouterr().err
