"""Every supported family, in its variants: Hugging Face's logits to the last bit, no look into the
future, weights that survive the way there and back."""

import pytest
import torch
from families import VARIANTS, check_no_look_into_the_future, layers_of, run
from transformers import AutoModelForCausalLM

from ds_local.model import families
from ds_local.model.hf_layers import from_hf, to_hf


@pytest.fixture(params=sorted(VARIANTS))
def config(request):
    return families.load_model_config(VARIANTS[request.param])


def tokens(*shape):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(0))


def random_model(config):
    """Weights far from their initial values, biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_logits_equal_hugging_faces_and_weights_survive(config):
    model = random_model(config)
    state = model.state_dict()
    layers = layers_of(config)
    for layer, tensors in zip(layers, from_hf(config, state).values(), strict=True):
        layer.load_state_dict(tensors)
    ids = tokens(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(layers, ids), model(input_ids=ids).logits, rtol=0, atol=0)
    back = to_hf(config, {i: layer.state_dict() for i, layer in enumerate(layers)})
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


PADDED = torch.ones(3, 16, dtype=torch.int64)
PADDED[0, :5] = PADDED[2, :1] = 0
BESIDE = {
    "left padding": {"attention_mask": PADDED},
    "right padding": {"attention_mask": PADDED.flip(1)},
    "left padding, its own positions": {
        "attention_mask": PADDED,
        "position_ids": (PADDED.cumsum(1) - 1).clamp(min=0),
    },
    "packed": {"position_ids": torch.cat([torch.arange(6), torch.arange(10)]).expand(3, 16)},
    "a mask of one's own": {"attention_mask": torch.ones(3, 1, 16, 16).tril(3).tril().bool()},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_masks_and_positions_count_as_in_hugging_faces_models(config, beside):
    model = random_model(config)
    layers = layers_of(config)
    for layer, tensors in zip(layers, from_hf(config, model.state_dict()).values(), strict=True):
        layer.load_state_dict(tensors)
    given = {"input_ids": tokens(3, 16), **BESIDE[beside]}
    with torch.no_grad():
        ours, theirs = run(layers, given), model(**given, use_cache=False).logits
        assert torch.equal(ours, theirs)
        if beside != "a mask of one's own" and "right" not in beside:
            assert not torch.equal(ours, run(layers, given["input_ids"]))


def test_changing_a_token_changes_no_earlier_logits(config):
    check_no_look_into_the_future(config, tokens(1, 16))


def test_initial_weights_are_spread_like_hugging_faces(config):
    torch.manual_seed(0)
    theirs = from_hf(config, AutoModelForCausalLM.from_config(config).state_dict())
    for number, layer in enumerate(layers_of(config)[:-1]):
        for name, tensor in layer.state_dict().items():
            assert tensor.std().item() == pytest.approx(
                theirs[number][name].std().item(), rel=0.2, abs=1e-6
            ), (number, name)
