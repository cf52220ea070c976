"""Runs as Hugging Face models and back: every exit has the loss the run reports, and training goes
on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from families import MIXTRAL, VARIANTS
from ranks import run_ranks
from reference import batch
from samples import sampled
from transformers import AutoModelForCausalLM

from ds_local.checkpoints import hf_export as hf
from ds_local.checkpoints.source import find_checkpoint
from ds_local.errors import CheckpointError
from ds_local.model import families
from ds_local.model.hf_layers import to_hf
from ds_local.model.pretrained import HEADS_FILE

PLAIN = {"mode": "local"}
RICH = {"mode": "local", "head": {"blocks": [1, 0, 1], "rank": 8, "temperature": True}}
SHARED = {
    "mode": "local",
    "head": {"blocks": 1, "blocks_from": "next_tracked", "readout": "shared", "refresh_every": 1},
}


def build(model: Any, section: dict[str, Any], stages: int, **extra: Any) -> Any:
    import ds_local

    config = jobs.ds_config(section, **extra)
    return ds_local.initialize(
        model=ds_local.causal_lm(model, num_stages=stages, config=config), config=config
    )[0]


def train_and_save(
    model: Any, section: dict[str, Any], stages: int, folder: str, **extra: Any
) -> dict[str, Any]:
    """Two steps, a checkpoint, evaluation, and the losses of one more step."""
    engine = build(model, section, stages, **extra)
    data = jobs.batches(engine)
    for _ in range(2):
        engine.train_batch(data)
    engine.save_checkpoint(folder)
    engine.eval_batch(jobs.batches(engine, start=500), num_micro_batches=4)
    return {"eval": engine.eval_losses, "next": next_losses(engine)}


def next_losses(engine: Any) -> dict[int, float]:
    seen: list[Any] = []
    engine.reports.listeners.append(lambda rows: seen.append({r.segment: r.loss for r in rows}))
    engine.train_batch(jobs.batches(engine, start=2))
    engine.reports.flush()
    return seen[-1] if seen else {}


def go_on(model: str, section: dict[str, Any], stages: int) -> dict[str, Any]:
    engine = build(model, section, stages)
    engine.eval_batch(jobs.batches(engine, start=500), num_micro_batches=4)
    return {"eval": engine.eval_losses, "next": next_losses(engine)}


def loss_of(folder: Path) -> float:
    """By plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        losses = [
            model(input_ids=ids, labels=ids).loss.item()
            for ids in (batch(500, m, 0) for m in range(4))
        ]
    return sum(losses) / len(losses)


EXITS = [  # (model, section, stages)
    ("gpt2", RICH, 2),
    ("llama", SHARED, 1),
    ("gpt_neox", PLAIN, 4),
    ("gemma2, capped, every second sliding", RICH, 1),
    ("experts", RICH, 1),
    ("qwen3 half sliding, tied", RICH, 2),
    ("olmo", PLAIN, 1),
    ("phi, a readout with a bias", RICH, 1),
]


@pytest.mark.parametrize(("variant", "section", "stages"), sampled(EXITS[:4], EXITS))
def test_every_exit_has_the_losses_of_the_run_and_training_goes_on(
    tmp_path, variant, section, stages
):
    section = {**section, "segments_per_stage": 4 // stages}
    model = MIXTRAL if variant == "experts" else VARIANTS[variant]
    ours = run_ranks(train_and_save, stages, model, section, stages, str(tmp_path / "run"))[0]
    exits = hf.export_all(tmp_path / "run", tmp_path / "out", heads=True)
    assert list(exits) == [0, 1, 2, 3]
    for segment, folder in exits.items():
        assert loss_of(folder) == pytest.approx(ours["eval"][segment], rel=1e-5)
        config = json.loads((folder / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert not [key for key in config if key.startswith("_")]
    again = {**section, "segments_per_stage": 2}
    back = run_ranks(go_on, 2, str(exits[3]), again, 2)[0]
    for kind in ("eval", "next"):
        for segment, loss in ours[kind].items():
            assert back[kind][segment] == pytest.approx(loss, rel=1e-6)


def test_bf16_zero_1_and_replicas(tmp_path):
    section = {"mode": "local", "head": {"rank": 8}}
    extra = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    ours = run_ranks(
        train_and_save, 4, VARIANTS["llama"], section, 2, str(tmp_path / "run"), **extra
    )[0]
    for segment, folder in hf.export_all(tmp_path / "run", tmp_path / "out").items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert loss_of(folder) == pytest.approx(
            ours["eval"][segment], abs=0.05
        )  # two replicas read other sequences


def weights_of(model: str, section: dict[str, Any], stages: int) -> dict[str, Any]:
    import ds_local

    config = jobs.ds_config(section)
    module = ds_local.causal_lm(model, num_stages=stages, config=config)
    return {
        "layers": {
            i: layer.state_dict()
            for i, layer in zip(module.layer_numbers, module.forward_funcs, strict=True)
        },
        "heads": {int(segment): head.state_dict() for segment, head in module.heads.items()},
    }


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_pretrained_weights_arrive_bit_by_bit_in_any_number_of_stages(tmp_path, stages):
    for variant in ("gpt2", "mistral sliding"):  # tied and untied, one file and shards
        config = families.load_model_config(VARIANTS[variant])
        torch.manual_seed(stages)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(
            tmp_path / variant, max_shard_size="100GB" if variant == "gpt2" else "20KB"
        )
        found = run_ranks(
            weights_of,
            stages,
            str(tmp_path / variant),
            {"mode": "local", "head": {"init": "model"}},
            stages,
        )
        layers = {number: state for rank in found for number, state in rank["layers"].items()}
        state = to_hf(config, layers)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        family = families.family_of(config)
        for head in [head for rank in found for head in rank["heads"].values()]:
            assert torch.equal(head["norm.weight"], state[f"{family.norm}.weight"])
            assert torch.equal(head["readout.weight"], state[f"{family.readout}.weight"])


def test_damaged_checkpoints_leave_nothing_behind(tmp_path):
    run_ranks(
        train_and_save,
        1,
        VARIANTS["gpt2"],
        {**RICH, "segments_per_stage": 4},
        1,
        str(tmp_path / "run"),
    )
    checkpoint = find_checkpoint(tmp_path / "run")
    layer, head, facts = (
        checkpoint / name
        for name in ("layer_02-model_states.pt", "head_00-model_states.pt", "ds_local.json")
    )

    def refused(said: str, **how: Any) -> None:
        with pytest.raises((hf.ExportError, CheckpointError), match=said):
            hf.export(tmp_path / "run", tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def reseal(path: Path, state: Any) -> None:
        """What a program that keeps the checksums right could have done."""
        from ds_local.checkpoints.sums import _checksum

        torch.save(state, path)
        told = json.loads(facts.read_text())
        told["files"][path.name] = _checksum(path)
        facts.write_text(json.dumps(told))

    refused("segment 7 does not exist", segment=7)
    for path, how in ((layer, {}), (head, {"segment": 0})):
        whole = path.read_bytes()
        path.write_bytes(whole[:-100])
        refused(f"{path.name} is damaged", **how)
        path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
        refused(f"{path.name} is damaged", **how)
        path.unlink()
        refused(f"{path.name} is missing", **how)
        path.write_bytes(whole)
        state = torch.load(path, weights_only=True)
        name = next(name for name in state if name.startswith("block"))
        reseal(path, {**state, name: state[name][:-1]})
        own = name[
            name.index("block.") :
        ]  # without the number of a private block, which is named before
        refused(rf"{path.name}.*: tensor {own} has shape", **how)
        reseal(path, {key: tensor for key, tensor in state.items() if key != name})
        refused(rf"{path.name}.*: tensors missing: {own}", **how)
        reseal(path, {**state, "strange": torch.zeros(1)})
        refused(rf"{path.name}: .*unknown: strange", **how)
        reseal(path, {"code": print})
        refused(f"cannot read .*{path.name}", **how)
        reseal(path, state)
    hf.export(tmp_path / "run", tmp_path / "out", segment=0)
    hf.export(tmp_path / "run", tmp_path / "out")  # replaces an export
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(hf.ExportError, match="is left alone"):
        hf.export(tmp_path / "run", tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"


def test_heads_of_another_make_are_named(tmp_path):
    section = {**RICH, "segments_per_stage": 4}
    run_ranks(train_and_save, 1, VARIANTS["gpt2"], section, 1, str(tmp_path / "run"))
    folder = hf.export(tmp_path / "run", tmp_path / "out", heads=True)
    assert (folder / HEADS_FILE).is_file()
    with pytest.raises(
        Exception, match=f"{HEADS_FILE}: the head of segment 0 .*too much and lacks"
    ):
        run_ranks(weights_of, 1, str(folder), {"mode": "local", "segments_per_stage": 4}, 1)


def peak_of_import(model: str, config: dict[str, Any], stages: int) -> tuple[int, int]:
    """(bytes by which loading raised this process's peak memory, bytes of its parameters)."""
    import gc

    import ds_local

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    ds_local.causal_lm(
        model, num_stages=stages, config=config
    )  # what the first model costs once: skeleton, libraries
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
    before = status("VmRSS")
    module = ds_local.causal_lm(model, num_stages=stages, config=config)
    return status("VmHWM") - before, sum(p.numel() * p.element_size() for p in module.parameters())


def test_each_ranks_memory_stays_near_its_share(tmp_path):
    big = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 32768}
    model = AutoModelForCausalLM.from_config(families.load_model_config(VARIANTS["llama"] | big))
    model.save_pretrained(tmp_path)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    for peak, share in run_ranks(
        peak_of_import, 2, str(tmp_path), jobs.ds_config({"mode": "backprop"}), 2
    ):
        print(
            f"share {share / 2**20:.0f} MiB of {whole / 2**20:.0f}, peak {peak / share:.2f} times "
            f"the share"
        )
        assert share < 0.6 * whole
        assert peak < 1.3 * share
