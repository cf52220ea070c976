"""Pipeline layers and state dicts of Hugging Face models, made of each other."""

import pytest
import torch
from families import layers_of
from reference import MODELS

from ds_local.checkpoints.hf_layers import from_hf, to_hf
from ds_local.model import families


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
