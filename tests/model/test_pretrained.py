"""Reading pretrained weights: whatever form they are stored in, and sentences for what cannot be
read."""

import json

import pytest
import torch
from families import VARIANTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ds_local.errors import WeightsError
from ds_local.model import blocks
from ds_local.model.pretrained import Weights, find_weights, load_layer


def save(folder, variant="gpt2", **how):
    config = blocks.load_model_config(VARIANTS[variant])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, **how)
    return model


def layers_from(folder):
    config = blocks.load_model_config(folder)
    weights = Weights(find_weights(folder), config)
    layers = [
        blocks.Embedding(config, 1),
        *(blocks.Block(config, i, 1) for i in range(4)),
        blocks.Readout(config, 1),
    ]
    for number, layer in enumerate(layers):
        load_layer(layer, number, weights)
    return layers


def same_logits(model, folder):
    hidden = ids = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        for layer in layers_from(folder):
            hidden = layer.eval()(hidden)
        expected = model.eval()(input_ids=ids).logits
    return torch.equal(hidden, expected)


def rename(folder, change):
    path = folder / "model.safetensors"
    save_file(
        {change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"}
    )


def test_names_without_the_base_models_prefix(tmp_path):
    model = save(tmp_path)
    rename(tmp_path, lambda name: name.removeprefix("transformer."))
    assert same_logits(model, tmp_path)


def test_the_readouts_name_in_older_pythias(tmp_path):
    model = save(tmp_path, "gpt_neox")
    rename(tmp_path, lambda name: name.replace("lm_head", "embed_out"))
    assert same_logits(model, tmp_path)


def test_large_tensors_come_in_pieces(tmp_path, monkeypatch):
    model = save(tmp_path, "llama")
    monkeypatch.setattr("ds_local.model.pretrained._PIECE", 100)
    assert same_logits(model, tmp_path)


def test_half_precision_weights_become_float32(tmp_path):
    config = blocks.load_model_config(VARIANTS["llama"])
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path)
    layers = layers_from(tmp_path)
    assert {p.dtype for layer in layers for p in layer.parameters()} == {torch.float32}
    assert torch.equal(layers[-1].readout.weight, model.lm_head.weight.float())


def test_what_counts_as_pretrained(tmp_path):
    save(tmp_path / "model")
    assert find_weights(tmp_path / "model") == tmp_path / "model"
    assert find_weights(tmp_path / "model" / "config.json") is None
    (tmp_path / "model" / "model.safetensors").unlink()
    assert find_weights(tmp_path / "model") is None
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"has no safetensors.*save_pretrained"):
        find_weights(tmp_path / "model")


def test_hub_names_are_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small"
    save(repository / "snapshots" / "0123456789012345678901234567890123456789")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789012345678901234567890123456789")
    folder = find_weights("someone/small")
    assert folder is not None
    assert (folder / "model.safetensors").is_file()
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(WeightsError, match="someone/small has no safetensors"):
        find_weights("someone/small")  # pickled ones are not even fetched
    with pytest.raises(WeightsError, match="cannot fetch the weights of someone/else"):
        find_weights("someone/else")


def damage(folder, kind):
    single = folder / "model.safetensors"
    if kind == "missing shard":
        next(folder.glob("model-00002*")).unlink()
    elif kind == "lying index":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "truncated":
        single.write_bytes(single.read_bytes()[:-40])
    elif kind == "no safetensors":
        single.write_bytes(b"something else")
    elif kind == "missing tensor":
        tensors = load_file(single)
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, single)
    elif kind == "other shape":
        save_file(load_file(single) | {"model.norm.weight": torch.zeros(31)}, single)
    elif kind == "no readout":
        tensors = load_file(single)
        del tensors["lm_head.weight"]
        save_file(tensors, single)
    elif kind == "other family":
        save(folder / "other")
        (folder / "other" / "model.safetensors").replace(single)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "missing shard",
            r"model-00002-of-.*\.safetensors is missing; model.safetensors.index.json names it",
        ),
        ("lying index", r"model-0.*\.safetensors has no tensor model.norm.weight"),
        ("truncated", r"cannot read .*model\.safetensors"),
        ("no safetensors", r"cannot read .*model\.safetensors"),
        ("missing tensor", r"has no tensor model.layers.2.mlp.up_proj.weight"),
        (
            "other shape",
            r"model\.safetensors: tensor model.norm.weight has shape \[31\], the model needs \[32\]",
        ),
        ("no readout", r"has no tensor lm_head.weight, and its config does not tie it"),
        ("other family", r"has no tensor model.embed_tokens.weight, .* is it of another model\?"),
    ],
)
def test_weights_that_cannot_be_used_are_named(tmp_path, kind, said):
    shards = {"max_shard_size": "20KB"} if kind in ("missing shard", "lying index") else {}
    save(tmp_path, "llama", **shards)
    damage(tmp_path, kind)
    with pytest.raises(WeightsError, match=said):
        layers_from(tmp_path)
