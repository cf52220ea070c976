"""Every family of the page of models: what works is exact, what is refused is refused."""

import copy
import re

import models_page
import pytest
import torch
import transformers
from samples import sampled
from transformers import AutoModelForCausalLM

from ds_local.errors import DsLocalError
from ds_local.model import families
from ds_local.model.family_check import fault_of, layers_of, state_of, tried
from ds_local.model.pretrained import Weights, find_weights, load_layer
from ds_local.model.small_models import shrunk

TEXT = models_page.PAGE.read_text()
ROWS = dict(re.findall(r"^\| ([\w-]+) \| (.*) \|$", TEXT.split("## What works")[1], re.M))
WORKS = re.findall(r"^\| ([\w-]+) \|", TEXT.split("## What works")[1].split("## ")[0], re.M)[1:]
REFUSED = re.findall(r"^\| ([\w-]+) \|", TEXT.split("## What is refused")[1], re.M)[1:]
# whose generation with a cache is another one in plain transformers too
OTHER_CACHE = {"moshi"}
# one of each reason, and quick
SAMPLE = ["bart", "bert", "cpmant", "falcon_h1", "gemma3", "minicpm3", "xlm", "xlnet", "zamba2"]

pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in TEXT, reason="the page is of another one"
)


@pytest.mark.parametrize("family", sampled(WORKS[::8], WORKS))
def test_what_works_is_exact(family, tmp_path):
    config = shrunk(models_page.example(family), tried)
    assert fault_of(config) is None  # logits, causality, prefixes, router loss
    model, ids, logits = tried(config)
    layers = from_folder(model, tmp_path / "model")
    whole = model.state_dict()
    state = state_of(config, layers)
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())

    exported = as_exported(config, state, tmp_path / "exported")
    assert all(torch.equal(state[name], tensor) for name, tensor in exported.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids, use_cache=False).logits, logits)
    if family not in OTHER_CACHE:
        how = {"max_new_tokens": 3, "do_sample": False}
        with_cache = exported.generate(ids, use_cache=True, **how)
        assert torch.equal(with_cache, exported.generate(ids, use_cache=False, **how))


def from_folder(model, folder):
    """Layers with the weights that a model has saved."""
    model.save_pretrained(folder)
    layers = layers_of(model)
    weights = Weights(find_weights(folder), model.config)
    for number, layer in enumerate(layers):
        with torch.no_grad():
            for tensor in layer.state_dict().values():
                tensor.zero_()
        load_layer(layer, number, weights)
    return layers


def as_exported(config, state, folder):
    """What plain transformers reads of a folder that was written as an export is."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    empty.save_pretrained(folder, state_dict=tensors)
    exported, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return exported.eval()


@pytest.mark.parametrize("family", sampled(SAMPLE, REFUSED))
def test_what_is_refused_is_refused_in_a_sentence(family):
    found = models_page.row(family)
    assert not found.works
    assert found.reason == ROWS[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", WORKS)
def test_the_page_says_what_the_check_finds(family):
    found = models_page.row(family)
    assert found.works
    assert found.experts == ROWS[family]


def test_a_refusal_is_an_error_of_ours():
    with pytest.raises(DsLocalError, match=r"a minicpm3 cannot be trained in parts: .*models.md"):
        families.load_model_config(models_page.example("minicpm3"))
