"""The quality study's book-keeping: which runs share a beginning, which learning rate counts, what
equal time means."""

import hashlib
import json
import math
from importlib import metadata

import pytest
import study
import torch


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


def wsd_run(folder, steps, checkpoints, factor):
    """The folder of a WSD run of so many steps that has written these checkpoints."""
    place = folder / run_of("chunked 2, WSD", step_factor=factor).name
    for step in checkpoints:
        checkpoint = place / "run" / "checkpoints" / f"global_step{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "ds_local.json").write_text("{}")
    scheduler = {"params": {"total_num_steps": steps}}
    (place / "ds_config.json").write_text(json.dumps({"scheduler": scheduler}))
    return place / "run"


def test_runs_of_different_lengths_begin_alike_until_one_decays(tmp_path):
    half = wsd_run(tmp_path, 1500, [900, 1200, 1350], 0.5)  # decays from step 1200 on
    whole, tail = run_of("chunked 2, WSD"), run_of("chunked 2, backprop tail 40 %, WSD")
    assert study._shared(whole, tmp_path) == (half, "global_step1200")
    double = wsd_run(tmp_path, 6000, [1500, 1800, 2400, 2700], 2.0)
    assert study._shared(whole, tmp_path) == (double, "global_step2400")
    assert study._shared(tail, tmp_path) == (double, "global_step1800")
    assert study._shared(tail._replace(seed=2), tmp_path) is None
    alone = run_of("first chunk alone, rest fresh, backprop tail 40 %, WSD")
    assert study._shared(alone, tmp_path) == (double, "global_step1800")
    alone = alone._replace(step_factor=0.8)  # nobody has a checkpoint where its tail begins
    assert study._shared(alone, tmp_path) is None


@pytest.mark.parametrize("how", ["fresh", "copied"])
def test_only_the_first_chunk_has_learnt(tmp_path, how):
    """A model of four blocks of which the first two are the first chunk."""
    layers = 6
    names = [f"layer_{layer:02d}-model_states.pt" for layer in range(layers)]
    for layer, name in enumerate(names):
        weights = {"block.mlp.c_proj.weight": torch.full((64, 64), float(layer))}
        if layer in (0, layers - 1):
            weights = {"readout.weight": torch.full((64, 64), float(layer))}
        torch.save(weights | {"norm.bias": torch.full((64,), 7.0)}, tmp_path / name)
    head = {"readout.weight": torch.full((64, 64), 0.5), "norm.bias": torch.full((64,), 0.25)}
    torch.save(head, tmp_path / "head_01-model_states.pt")
    state = {i: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for i in range(14)}
    stage = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"optimizer": {"state": state}}, stage)
    files = {path.name: [0, ""] for path in tmp_path.iterdir()}
    facts = {"segment_parts": [0, 2, 3, 4, 6], "files": files}
    facts["model"] = {"initializer_range": 0.08, "n_layer": 8}
    (tmp_path / "ds_local.json").write_text(json.dumps(facts))

    study.renew_above(tmp_path, 1, how, seed=3)

    states = [torch.load(tmp_path / name) for name in names]
    block = [state.get("block.mlp.c_proj.weight") for state in states]
    assert block[1].unique().tolist() == [1]  # below nothing has changed
    assert block[2].unique().tolist() == [2]
    if how == "copied":
        assert [block[3].unique().tolist(), block[4].unique().tolist()] == [[1], [2]]
    else:
        assert block[3].std().item() == pytest.approx(0.08 / 4, rel=0.05)
        assert states[3]["norm.bias"].unique().tolist() == [0]
        assert not torch.equal(block[3], block[4])
    assert states[5]["readout.weight"].unique().tolist() == [0.5]
    assert states[5]["norm.bias"].unique().tolist() == [0.25]
    moments = torch.load(stage)["optimizer"]["state"]
    kept = [i for i, state in moments.items() if state["exp_avg_sq"].any()]
    assert kept == [0, 1, 2, 3, 4, 5, 12, 13]  # the layers below, and the head
    sums = json.loads((tmp_path / "ds_local.json").read_text())["files"]
    for name in [*names[3:], stage.name]:
        content = (tmp_path / name).read_bytes()
        assert sums[name] == [len(content), hashlib.sha256(content).hexdigest()]
    assert sums[names[2]] == [0, ""]


def test_the_text_of_packages_has_every_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TEXT_OF", ("packaging", "pluggy"))
    text = study.package_text(tmp_path)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    facts = json.loads((tmp_path / "packages.json").read_text())
    assert len(documents) == len(set(documents)) == facts["files"] == len(facts["file_sha256"])
    assert facts["packages"] == {name: metadata.version(name) for name in study.TEXT_OF}
    sums = [hashlib.sha256(document.encode()).hexdigest() for document in documents]
    assert sums == list(facts["file_sha256"].values())
    assert {name.partition("/")[0] for name in facts["file_sha256"]} == set(study.TEXT_OF)
    first = text.read_bytes()
    assert study.package_text(tmp_path).read_bytes() == first


def test_each_schedule_has_its_own_yardstick():
    machine = {"device": "cpu", "processor": "x"}
    losses = {"backprop": 2.0, "chunked 2": 2.25, "backprop, WSD": 1.5, "chunked 2, WSD": 1.625}
    results = [
        run_of(method, lr_factor=1.0)._asdict()
        | {"loss": loss, "tokens": 10, "curve": [(10, loss)], "machine": machine}
        | {"exits": {"1": 1.75, "3": loss} if "chunked" in method else {"3": loss}}
        for method, loss in losses.items()
    ]
    rows = {row["method"]: row for row in study.summary("cpu", results)}
    assert {name: row["gap_nats"] for name, row in rows.items()} == {
        "backprop": 0.0,
        "chunked 2": 0.25,
        "backprop, WSD": 0.0,
        "chunked 2, WSD": 0.125,
    }
    assert [row["depth_pays"] for row in rows.values()] == [False, False, True, True]
    table = study.ratio_markdown({"cpu-gpt2-ratio": list(rows.values())})
    assert "| chunked 2, WSD, K = 4 | 1,600 | 1 | 1.6250 | 1.7500 | +0.1250 | +13.3 % |" in table
    assert "| backprop, K = 4 | 1,600 | 1 | 2.0000 | - | +0.0000 | +0.0 % |" in table
    assert "**With 1,600 steps depth does not pay yet**" in table
    assert "depth" not in study.ratio_markdown({"cpu-gpt2-ratio": list(rows.values())[2:]})


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
