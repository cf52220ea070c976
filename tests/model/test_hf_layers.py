"""Pipeline layers and state dicts of Hugging Face models, made of each other."""

import pytest
import torch
from families import layers_of
from reference import MODELS

from ds_local.errors import ExportError
from ds_local.model import families
from ds_local.model.hf_layers import from_hf, to_hf


@pytest.fixture(params=sorted(MODELS))
def config(request):
    return families.load_model_config(MODELS[request.param])


def test_to_hf_is_the_inverse(config):
    layers = layers_of(config)
    state = to_hf(config, {i: layer.state_dict() for i, layer in enumerate(layers)})
    back = from_hf(config, state)
    for i, layer in enumerate(layers):
        assert back[i].keys() == layer.state_dict().keys()
        assert all(
            torch.equal(back[i][name], tensor) for name, tensor in layer.state_dict().items()
        )


def test_a_tied_readout_is_taken_from_the_embedding():
    config = families.load_model_config(MODELS["gpt2"])
    state = to_hf(config, {i: layer.state_dict() for i, layer in enumerate(layers_of(config))})
    del state["lm_head.weight"]
    back = from_hf(config, state)
    assert torch.equal(back[5]["readout.weight"], state["transformer.wte.weight"])


def test_a_layer_that_does_not_fit_is_named():
    config = families.load_model_config(MODELS["gpt2"])
    layers = {i: dict(layer.state_dict()) for i, layer in enumerate(layers_of(config))}
    layers[2]["extra"] = layers[2].pop("block.ln_1.bias")
    with pytest.raises(
        ExportError, match=r"layer 2: tensors missing: block\.ln_1\.bias; unknown: extra"
    ):
        to_hf(config, layers)
    layers[2]["block.ln_1.bias"] = torch.zeros(3)
    del layers[2]["extra"]
    with pytest.raises(ExportError, match=r"ln_1\.bias has shape \[3\], the model needs \[32\]"):
        to_hf(config, layers)
    with pytest.raises(ExportError, match=r"layer 2: tensors missing: .*; unknown: none"):
        to_hf(config, {number: layers[number] for number in range(2)} | {2: {}})
