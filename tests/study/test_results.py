"""What is read from finished runs: which learning rate counts, what equal time means."""

import json
import math

import pytest
from study_runs import run_of

from ds_local.errors import DataError
from ds_local.study.recipes import TRIAL
from ds_local.study.results import (
    all_runs,
    best_rate,
    gaps_to,
    percent,
    time_for_the_loss,
    tokens_to,
)


def test_rates_are_compared_on_the_seeds_they_share():
    results = [
        {"lr_factor": rate, "seed": seed, "loss": loss}
        for rate, seed, loss in (
            (1.0, 1, 2.0),
            (1.0, 2, 1.0),
            (2.0, 1, 1.9),
        )  # the mean of rate 1 is lower, but not on seed 1
    ]
    assert [r["lr_factor"] for r in best_rate(results)] == [2.0]


def test_backprop_to_the_same_loss():
    whole_runs = {0.81: 3.0, 1.0: 2.0, 1.44: 1.5, 3.0: 1.0}
    assert time_for_the_loss(2.5, whole_runs) == pytest.approx(0.9)
    assert time_for_the_loss(2.0, whole_runs) == 1.0
    assert time_for_the_loss(1.75, whole_runs) == pytest.approx(1.2)
    assert time_for_the_loss(1.2, whole_runs) is None  # too far from either
    assert time_for_the_loss(3.1, whole_runs) is None
    assert time_for_the_loss(2.0, {1.0: 2.0}) is None  # nothing to tell how fast the loss falls


def test_the_gap_is_between_runs_of_the_same_seeds():
    runs = [{"seed": 1, "loss": 2.0}, {"seed": 2, "loss": 2.5}, {"seed": 3, "loss": 9.0}]
    assert gaps_to({1: 1.9, 2: 2.2, 3: None}, runs) == pytest.approx([0.1, 0.3])
    assert gaps_to({4: 1.0}, runs) == []
    assert percent(math.log(1.05)) == 5.0


def test_of_some_runs_only_the_end_is_known():
    whole, end = {"curve": [(10, 3.0), (20, 2.0), (40, 1.0)]}, {"curve": [(40, 1.2)]}
    assert tokens_to(1.5, [whole, end]) == 0.75
    assert tokens_to(1.5, [end]) is None


def test_finished_runs_are_kept_beside_those_of_other_machines(tmp_path):
    kept, folder = tmp_path / "runs.jsonl", tmp_path / "study"
    here = run_of("local")._asdict() | {"loss": 1.0}
    there = run_of("backprop")._asdict() | {"loss": 2.0}
    kept.write_text(json.dumps(there) + "\n" + json.dumps(here | {"loss": 3.0}) + "\n")
    (folder / "cpu" / "local").mkdir(parents=True)
    (folder / "cpu" / "local" / "result.json").write_text(json.dumps(here))
    (folder / TRIAL / "local").mkdir(parents=True)
    (folder / TRIAL / "local" / "result.json").write_text(json.dumps(here | {"preset": TRIAL}))
    assert all_runs(kept, folder) == [there, here]
    assert all_runs(kept, tmp_path / "nothing") == [there, here]


def test_runs_of_different_texts_are_not_compared(tmp_path):
    kept = tmp_path / "runs.jsonl"
    one, other = (run_of(method)._asdict() | {"loss": 1.0} for method in ("local", "backprop"))
    kept.write_text(json.dumps(one | {"data": "aa"}) + "\n" + json.dumps(other) + "\n")
    before = kept.read_text()
    with pytest.raises(DataError, match=r"runs of cpu .* \(None, aa: the fingerprints\)"):
        all_runs(kept, tmp_path)
    assert kept.read_text() == before
