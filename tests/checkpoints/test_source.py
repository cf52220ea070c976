"""A checkpoint as the source of a Hugging Face model, from layers written by hand."""

import json

import pytest
import torch
from families import layers_of
from reference import GPT2

from ds_local.checkpoints.facts import FACTS, write_facts
from ds_local.checkpoints.folder import Writing
from ds_local.checkpoints.source import Checkpoint, find_checkpoint, sound_run_facts
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.sections import HeadConfig
from ds_local.errors import CheckpointError, ExportError
from ds_local.model import blocks, families
from ds_local.outputs.checkpoint_names import HEAD_FILE

PARTS = [0, 3, 6]  # two segments of a model of four blocks


HEAD = {"rank": 4, "temperature": True}


@pytest.fixture
def run(tmp_path, request):
    """A run folder with one checkpoint; heads as a test asks for them."""
    options = getattr(request, "param", HEAD)
    config = families.load_model_config(GPT2)
    writing = Writing(tmp_path / "checkpoints", "global_step3")
    writing.target.mkdir()
    for number, layer in enumerate(layers_of(config)):
        torch.save(layer.state_dict(), writing.target / f"layer_{number:02d}-model_states.pt")
    head = blocks.make_head(config, 0, 3, HeadConfig(**options), PARTS)
    state = head.state_dict()
    if "log_temperature" in state:
        state["log_temperature"].fill_(0.5)
    torch.save(state, writing.target / HEAD_FILE.format(0))
    section = LocalParallelConfig(head=HeadConfig(**options)).model_dump(mode="json")
    writing.commit(
        {
            "step": 3,
            "num_stages": 2,
            "num_replicas": 1,
            "segment_parts": PARTS,
            "head_segments": [0],
            "local_parallel": section,
            "model": families.config_dict(config),
            "optimizer": {"type": "adamw", "precision": "fp32", "zero_stage": 0},
            "scheduler": None,
        },
        True,
    )
    return tmp_path


def test_it_is_found_from_the_run_its_folder_and_itself(run):
    place = run / "checkpoints" / "global_step3"
    assert [find_checkpoint(p) for p in (run, run / "checkpoints", place)] == [place] * 3
    with pytest.raises(CheckpointError):
        find_checkpoint(run / "nowhere")


def test_exits_are_segments_with_a_head_and_the_last(run):
    source = Checkpoint(run)
    assert (source.exits, source.last_segment, source.run) == ([0, 1], 1, run.resolve())
    for segment in (2, -1):
        with pytest.raises(ExportError, match=r"does not exist; the run has segments 0 to 1"):
            source.head(segment)


def test_the_last_exit_is_the_whole_model(run):
    source = Checkpoint(run)
    config, state = source.model(1)
    assert config.num_hidden_layers == 4
    assert state.keys() == families.skeleton(config).state_dict().keys() - {"lm_head.bias"}
    assert torch.equal(
        state["transformer.h.2.mlp.c_fc.weight"], source.layer(3)["block.mlp.c_fc.weight"]
    )


def test_a_prefix_has_its_heads_norm_and_folded_readout(run):
    source = Checkpoint(run)
    config, state = source.model(0)
    head = source.head(0)
    assert config.num_hidden_layers == 2
    assert source.config.num_hidden_layers == 4
    folded = head["readout.weight"] @ head["down.weight"] * torch.tensor(0.5).exp()
    torch.testing.assert_close(state["lm_head.weight"], folded)
    assert torch.equal(state["transformer.ln_f.weight"], head["norm.weight"])
    assert "transformer.h.2.ln_1.weight" not in state


@pytest.mark.parametrize("run", [{"companion": 1.0}], indirect=True)
def test_a_prefix_leaves_the_companion_behind(run):
    source = Checkpoint(run)
    assert source.head(0)["companion.foresee.weight"].shape == (32, 32)
    _, state = source.model(0)
    assert torch.equal(state["lm_head.weight"], source.head(0)["readout.weight"])


@pytest.mark.parametrize("run", [{"vocabulary": 8, "rare_samples": 4}], indirect=True)
def test_a_head_of_a_sampled_softmax_is_an_exit(run):
    source = Checkpoint(run)
    assert source.exits == [0, 1]
    _, state = source.model(0)
    assert state["lm_head.weight"].shape == (64, 32)


@pytest.mark.parametrize("run", [{"vocabulary": 8}], indirect=True)
def test_a_head_for_a_part_of_the_vocabulary_is_no_exit(run):
    source = Checkpoint(run)
    assert (source.exits, source.heads) == ([1], [0])
    assert source.head(0)["readout.weight"].shape == (9, 32)
    assert source.model(1)[0].num_hidden_layers == 4
    with pytest.raises(ExportError, match=r"tells 8 tokens apart.*export the full model"):
        source.model(0)


def test_a_damaged_layer_is_named(run):
    source = Checkpoint(run)
    layer = source.folder / "layer_02-model_states.pt"
    layer.write_bytes(layer.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"layer_02-model_states\.pt is damaged"):
        source.layer(2)


def test_facts_of_another_model_are_refused(run):
    path = run / "checkpoints" / "global_step3" / FACTS
    facts = json.loads(path.read_text())
    for key, value, said in (
        ("model", None, "is not of a Hugging Face model"),
        ("model", {"model_type": "bert"}, "no model has this config"),
        ("segment_parts", [0, 3, 5], r"cut at \[0, 3, 5\], the model has 6 layers"),
    ):
        changed = {k: v for k, v in facts.items() if k not in ("format", "seal")} | {key: value}
        path.write_text(write_facts(changed))
        with pytest.raises(ExportError, match=said):
            Checkpoint(run)


def test_run_json_may_be_missing_but_not_damaged(tmp_path):
    assert sound_run_facts(tmp_path) == {}
    (tmp_path / "run.json").write_text('{"a": 1}')
    assert sound_run_facts(tmp_path) == {"a": 1}
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ExportError, match="is damaged; move it away"):
            sound_run_facts(tmp_path)
