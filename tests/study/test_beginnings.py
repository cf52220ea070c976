"""Which runs share a beginning, and what of it is taken over."""

import hashlib
import json

import pytest
import torch
from study_runs import run_of

from ds_local.study.beginnings import leave_trunk, renew_above, shared


def test_the_tail_takes_over_what_the_trunk_had(tmp_path):
    run = run_of("local, backprop tail 40 %")
    place, trunk = tmp_path / run.name, tmp_path / run.trunk.name
    place.mkdir()
    for step in (1800, 2400):
        (trunk / "run" / "checkpoints" / f"global_step{step}").mkdir(parents=True)
    (trunk / "run" / "checkpoints" / "tokenizer").mkdir()
    (trunk / "run" / "run.json").write_text("{}")
    (trunk / "run" / "metrics.jsonl").write_text("")
    leave_trunk(run, place)
    assert not (place / "run").exists()  # the other run is not finished
    (trunk / "result.json").write_text("{}")
    leave_trunk(run, place)
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
    assert shared(whole, tmp_path) == (half, "global_step1200")
    double = wsd_run(tmp_path, 6000, [1500, 1800, 2400, 2700], 2.0)
    assert shared(whole, tmp_path) == (double, "global_step2400")
    assert shared(tail, tmp_path) == (double, "global_step1800")
    assert shared(tail._replace(seed=2), tmp_path) is None
    alone = run_of("first chunk alone, rest fresh, backprop tail 40 %, WSD")
    assert shared(alone, tmp_path) == (double, "global_step1800")
    alone = alone._replace(step_factor=0.8)  # nobody has a checkpoint where its tail begins
    assert shared(alone, tmp_path) is None


def test_where_losses_are_dropped_lengths_have_no_beginning_in_common(tmp_path):
    run = run_of("deep supervision, dropped by half, WSD")
    place = tmp_path / run._replace(step_factor=0.5).name
    (place / "run" / "checkpoints" / "global_step100").mkdir(parents=True)
    (place / "run" / "checkpoints" / "global_step100" / "ds_local.json").write_text("{}")
    scheduler = {"params": {"total_num_steps": 1500}}
    (place / "ds_config.json").write_text(json.dumps({"scheduler": scheduler}))
    assert shared(run, tmp_path) is None


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

    renew_above(tmp_path, 1, how, seed=3)

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
