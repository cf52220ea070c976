"""Runs of the study, trained with a model of next to no size."""

import json

import numpy as np

from ds_local.cli import study
from ds_local.study.recipes import PRESETS, TRIAL

TAIL = "local, backprop tail 40 %"


def lines(place, until):
    rows = map(json.loads, (place / "run" / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["segment"], r["loss"]) for r in rows if r["step"] <= until]


def test_a_run_is_trained_once_and_its_tail_goes_on_from_it(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcde"), 3)) for _ in range(16_000)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    preset = PRESETS[TRIAL]
    small = preset._replace(
        source=str(tmp_path / "text.txt"),
        tokenizer="sentencepiece:320",
        model={**preset.model, "vocab_size": 320},
    )
    monkeypatch.setitem(PRESETS, TRIAL, small)
    monkeypatch.chdir(tmp_path)
    command = ["run", "--preset", TRIAL, "--minutes", "4", "--methods", "local", TAIL]
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
    assert steps == {f"global_step{step}" for step in (6, 12, 14, 16, 18, 19, 20)}
    written = (trunk / "result.json").stat().st_mtime_ns
    assert study.main(command) == 0
    assert (trunk / "result.json").stat().st_mtime_ns == written
    assert study.main(["table"]) == 1  # trials do not count
    assert "no backprop run is finished" in capsys.readouterr().err
