"""The quality study's book-keeping: which runs share a beginning, which learning rate counts, what
equal time means."""

import json
import math

import pytest
import study


def run_of(method, **changes):
    return study.Run("cpu", method, 4, 1, 2.0, 1.0)._replace(**changes)


def test_a_tail_leaves_the_run_without_one():
    tail = run_of("mixed 1/4, tail 20 %", seed=3)
    assert tail.trunk == run_of("mixed 1/4", seed=3)
    assert tail.switch(0.2) == 2400
    assert run_of("mixed 1/4").trunk is None
    assert (
        run_of("mixed 1/4, tail 20 %, 1/8 of the tokens").trunk is None
    )  # nobody runs it without a tail


@pytest.mark.parametrize("preset", [name for name in study.PRESETS if name != "tiny"])
def test_every_tail_begins_at_a_checkpoint(preset):
    run = run_of("local", preset=preset)
    every = run.steps // study.CHECKPOINTS
    assert [run.switch(tail) % every for tail in study.TAILS] == [0] * len(study.TAILS)


def test_the_tail_takes_over_what_the_trunk_had(tmp_path):
    run = run_of("local, backprop tail 40 %")
    place, trunk = tmp_path / run.name, tmp_path / run.trunk.name
    place.mkdir()
    for step in (1800, 2400):
        (trunk / "run" / "checkpoints" / f"global_step{step}").mkdir(parents=True)
    (trunk / "run" / "checkpoints" / "tokenizer").mkdir()
    (trunk / "run" / "run.json").write_text("{}")
    (trunk / "run" / "metrics.jsonl").write_text("")
    study._leave_trunk(run, place)
    assert not (place / "run").exists()  # the other run is not finished
    (trunk / "result.json").write_text("{}")
    study._leave_trunk(run, place)
    assert (place / "run" / "checkpoints" / "latest").read_text() == "global_step1800"
    assert sorted(path.name for path in (place / "run" / "checkpoints").iterdir()) == [
        "global_step1800",
        "latest",
        "tokenizer",
    ]


def test_rates_are_compared_on_the_seeds_they_share():
    results = [
        {"lr_factor": rate, "seed": seed, "loss": loss}
        for rate, seed, loss in (
            (1.0, 1, 2.0),
            (1.0, 2, 1.0),
            (2.0, 1, 1.9),
        )  # the mean of rate 1 is lower, but not on seed 1
    ]
    assert [r["lr_factor"] for r in study.best_rate(results)] == [2.0]


def test_backprop_to_the_same_loss():
    whole_runs = {0.81: 3.0, 1.0: 2.0, 1.44: 1.5, 3.0: 1.0}
    assert study.time_for_the_loss(2.5, whole_runs) == pytest.approx(0.9)
    assert study.time_for_the_loss(2.0, whole_runs) == 1.0
    assert study.time_for_the_loss(1.75, whole_runs) == pytest.approx(1.2)
    assert study.time_for_the_loss(1.2, whole_runs) is None  # too far from either
    assert study.time_for_the_loss(3.1, whole_runs) is None
    assert (
        study.time_for_the_loss(2.0, {1.0: 2.0}) is None
    )  # nothing to tell how fast the loss falls


def test_the_gap_is_between_runs_of_the_same_seeds():
    runs = [{"seed": 1, "loss": 2.0}, {"seed": 2, "loss": 2.5}, {"seed": 3, "loss": 9.0}]
    assert study.gap_to({1: 1.9, 2: 2.2, 3: None}, runs) == pytest.approx(0.2)
    assert study.gap_to({4: 1.0}, runs) is None
    assert study.percent(math.log(1.05)) == 5.0


def test_of_some_runs_only_the_end_is_known():
    whole, end = {"curve": [(10, 3.0), (20, 2.0), (40, 1.0)]}, {"curve": [(40, 1.2)]}
    assert study.tokens_to(1.5, [whole, end]) == 0.75
    assert study.tokens_to(1.5, [end]) is None


def test_finished_runs_are_kept_beside_those_of_other_machines(tmp_path):
    kept, folder = tmp_path / "runs.jsonl", tmp_path / "study"
    here = run_of("local")._asdict() | {"loss": 1.0}
    there = run_of("backprop")._asdict() | {"loss": 2.0}
    kept.write_text(json.dumps(there) + "\n" + json.dumps(here | {"loss": 3.0}) + "\n")
    (folder / "cpu" / "local").mkdir(parents=True)
    (folder / "cpu" / "local" / "result.json").write_text(json.dumps(here))
    (folder / study.TRIAL / "local").mkdir(parents=True)
    (folder / study.TRIAL / "local" / "result.json").write_text(
        json.dumps(here | {"preset": study.TRIAL})
    )
    assert study.all_runs(kept, folder) == [there, here]
    assert study.all_runs(kept, tmp_path / "nothing") == [there, here]


def test_a_split_backward_takes_the_bubble_out_of_the_forecast():
    """By the known makespans; heads and the readout cost next to nothing beside so wide a block."""
    wide = study._gpt2(8, 512, 4, 16, 64)
    _, plain, split = study.predict(wide, study.METHODS["chunked 2"], 4, 64)
    assert plain[4, 0] == pytest.approx(15 / 21, rel=0.01)
    assert split[4, 0] == pytest.approx(12 / 21, rel=0.01)
    assert split[8, 0] == pytest.approx(24 / 33, rel=0.01)


def test_a_row_without_a_yardstick_is_left_out(capsys):
    """A method run for longer than backprop was, and a preset in which backprop was not run at
    all."""
    machine = {"device": "cpu", "processor": "x"}
    backprop = run_of("backprop", lr_factor=1.0)._asdict() | {
        "loss": 2.0,
        "tokens": 10,
        "curve": [(10, 2.0)],
        "machine": machine,
    }
    eight = run_of("local", segments=8)._asdict() | {
        "loss": 2.1,
        "tokens": 10,
        "curve": [(10, 2.1)],
        "machine": machine,
    }
    longer = {**eight, "step_factor": 2.0}
    rows = study.summary("cpu", [backprop, eight, longer])
    assert [(row["method"], row["segments"], row["step_factor"]) for row in rows] == [
        ("backprop", 4, 1.0),
        ("backprop", 8, 1.0),
        ("local", 8, 1.0),
    ]
    assert "local is left out" in capsys.readouterr().err
    assert rows[1]["perplexity"] == rows[0]["perplexity"]  # where it is cut changes nothing
    assert study.summary("cpu", [eight]) == []
