"""Reading pretrained weights: whatever form they are stored in, and sentences for what cannot be
read."""

import json
import pickle

import pytest
import torch
from families import VARIANTS
from safetensors.torch import load_file, save_file
from sentences import one_sentence
from transformers import AutoModelForCausalLM

from ds_local.errors import WeightsError
from ds_local.model import blocks, families
from ds_local.model.pretrained import Weights, find_weights, load_layer, whole_model


def save(folder, variant="gpt2", **how):
    config = families.load_model_config(VARIANTS[variant])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, **how)
    return model


def layers_from(folder):
    config = families.load_model_config(folder)
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
    config = families.load_model_config(VARIANTS["llama"])
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


def change(folder, **changes):
    """Replace tensors of a single file by name (dots written as two underscores); None: remove."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value
    save_file(tensors, path, {"format": "pt"})


def other_family(folder):
    save(folder / "other")
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder, text=None, **files):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update({name.replace("__", "."): file for name, file in files.items()})
    path.write_text(json.dumps(index) if text is None else text)


def only(folder, name, content=b"x"):
    """A folder with a config and one file of weights in another form."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / name).write_bytes(content)


def cut(folder, size=None, content=None):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size] if content is None else content)


def nan(tensor):
    return tensor.clone().index_fill_(0, torch.tensor([len(tensor) - 1]), float("nan"))


NORM, UP = "model__norm__weight", "model__layers__2__mlp__up_proj__weight"
SINGLE = {
    "truncated": (lambda p: cut(p, -40), r"cannot read .*model\.safetensors"),
    "empty": (lambda p: cut(p, 0), r"cannot read .*model\.safetensors"),
    "no safetensors": (
        lambda p: cut(p, content=b"something else"),
        r"cannot read .*model\.safetensors",
    ),
    "a pickle under its name": (
        lambda p: cut(p, content=pickle.dumps({"a": 1})),
        r"cannot read .*model\.safet",
    ),
    "missing tensor": (
        lambda p: change(p, **{UP: None}),
        "has no tensor model.layers.2.mlp.up_proj.weight",
    ),
    "other shape": (
        lambda p: change(p, **{NORM: torch.zeros(31)}),
        r"model\.safetensors: tensor model.norm.weight has shape \[31\], the model needs \[32\]",
    ),
    "other dimensions": (lambda p: change(p, **{NORM: torch.zeros(4, 8)}), r"has shape \[4, 8\]"),
    "no readout": (
        lambda p: change(p, lm_head__weight=None),
        "has no tensor lm_head.weight, and its config does not tie it",
    ),
    "another family": (
        other_family,
        r"has no tensor model.embed_tokens.weight, .* is it of another model\?",
    ),
    "more layers": (
        lambda p: edit_config(p, num_hidden_layers=3),
        r"has 9 tensors that .* model.layers.3",
    ),
    "fewer layers": (
        lambda p: edit_config(p, num_hidden_layers=5),
        r"has no tensor model.layers.4",
    ),
    "other width": (lambda p: edit_config(p, intermediate_size=64), r"mlp.* has shape"),
    "unknown tensor": (
        lambda p: change(p, adapter__a=torch.zeros(2)),
        "has 1 tensors that .* as adapter.a",
    ),
    "NaN": (
        lambda p: change(p, **{UP: nan}),
        "model.layers.2.mlp.up_proj.weight holds NaN or infinity",
    ),
    "infinity": (
        lambda p: change(p, **{NORM: torch.full((32,), float("inf"))}),
        "norm.weight holds NaN or inf",
    ),
    "integers": (lambda p: change(p, **{UP: lambda t: t.to(torch.int8)}), "is of type I8"),
    "float8": (
        lambda p: change(p, **{UP: lambda t: t.to(torch.float8_e4m3fn)}),
        "is of type F8_E4M3",
    ),
    "quantized": (
        lambda p: edit_config(p, quantization_config={"quant_method": "gptq"}),
        "is quantized",
    ),
    "pickled": (
        lambda p: only(p, "pytorch_model.bin"),
        "pytorch_model.bin; pickled weights can run code",
    ),
    "pth": (
        lambda p: only(p, "consolidated.00.pth"),
        "consolidated.00.pth; pickled weights can run code",
    ),
    "gguf": (lambda p: only(p, "model-q4.gguf"), "no safetensors but model-q4.gguf"),
    "an adapter": (
        lambda p: only(p, "adapter_model.safetensors"),
        "adapter_model.safetensors, but neither",
    ),
    "half a download": (
        lambda p: only(p, "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors, but neither model.safetensors nor",
    ),
}
SHARDED = {
    "missing shard": (
        lambda p: next(p.glob("model-00002*")).unlink(),
        r"model-00002-of-.*\.safetensors is missing; model.safetensors.index.json names it",
    ),
    "lying index": (
        lambda p: edit_index(p, **{NORM: "model-00001-of-00008.safetensors"}),
        r"model-0.*\.safetensors has no tensor model.norm.weight",
    ),
    "half an index": (lambda p: edit_index(p, "{"), "index.json is no index of safetensors"),
    "a list": (lambda p: edit_index(p, "[]"), "index.json is no index of safetensors"),
    "no map": (lambda p: edit_index(p, "{}"), "index.json is no index of safetensors"),
    "a map of numbers": (
        lambda p: edit_index(p, '{"weight_map": {"a": 3}}'),
        "is no index of safetensors",
    ),
    "a map of nothing": (
        lambda p: edit_index(p, '{"weight_map": {}}'),
        "has no tensor model.embed_tokens",
    ),
    "truncated shard": (
        lambda p: next(p.glob("model-00002*")).write_bytes(b"x" * 20),
        r"cannot read .*model-00002",
    ),
}


@pytest.mark.parametrize("kind", [*SINGLE, *SHARDED])
def test_weights_that_cannot_be_used_are_named(tmp_path, kind):
    build, said = (SINGLE | SHARDED)[kind]
    save(tmp_path, "llama", **({"max_shard_size": "20KB"} if kind in SHARDED else {}))
    build(tmp_path)
    with pytest.raises(WeightsError, match=said) as found:
        layers_from(tmp_path)
    assert "\n" not in str(found.value)
    assert str(tmp_path) in str(found.value)


@pytest.mark.parametrize("kind", [*SINGLE, *SHARDED])
def test_whole_models_with_such_weights_are_refused_too(tmp_path, kind):
    """transformers would fill in what is missing at random, with a warning."""
    save(tmp_path, "llama", **({"max_shard_size": "20KB"} if kind in SHARDED else {}))
    assert whole_model(tmp_path).config.model_type == "llama"
    (SINGLE | SHARDED)[kind][0](tmp_path)
    if kind == "lying index":
        return  # transformers reads all of the files, whatever the index says
    with one_sentence(str(tmp_path), error=WeightsError):
        whole_model(tmp_path)


@pytest.mark.parametrize("where", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_models_that_do_not_exist(where):
    with one_sentence(where, "does not exist", error=WeightsError):
        find_weights(where)


def test_masks_and_frequencies_of_older_versions_do_no_harm(tmp_path):
    model = save(tmp_path / "gpt2")
    change(tmp_path / "gpt2", transformer__h__0__attn__bias=torch.ones(1, 1, 16, 16))
    change(tmp_path / "gpt2", transformer__h__0__attn__masked_bias=torch.tensor(-1e4))
    assert same_logits(model, tmp_path / "gpt2")
    model = save(tmp_path / "neox", "gpt_neox")
    for name in ("bias", "masked_bias", "rotary_emb__inv_freq"):
        change(tmp_path / "neox", **{f"gpt_neox__layers__0__attention__{name}": torch.ones(4)})
    assert same_logits(model, tmp_path / "neox")
