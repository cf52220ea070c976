"""Hugging Face models as layers: the same logits, no look into the future, weights that depend on
the layer alone."""

import pytest
import torch
from families import check_no_look_into_the_future, layers_of, run
from reference import MODELS
from transformers import AutoModelForCausalLM

from ds_local.config.sections import HeadConfig
from ds_local.errors import UnsupportedModel
from ds_local.model import blocks, families, flops
from ds_local.model.heads import lm_loss
from ds_local.model.hf_layers import from_hf


@pytest.fixture(params=sorted(MODELS))
def config(request):
    return families.load_model_config(MODELS[request.param])


def test_logits_equal_hugging_faces(config):
    torch.manual_seed(0)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = layers_of(config)
    for layer, state in zip(layers, from_hf(config, model.state_dict()).values(), strict=True):
        layer.load_state_dict(state)
    ids = torch.randint(0, 64, (3, 16))
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids)
        ours = run(layers, ids)
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=0)
    assert lm_loss(ours, ids).item() == pytest.approx(theirs.loss.item(), rel=1e-6)


def test_changing_a_token_changes_no_earlier_logits(config):
    check_no_look_into_the_future(config, torch.randint(0, 64, (1, 16)))


def test_weights_depend_on_seed_and_layer_alone(config):
    once, again, other = (layers_of(config, seed) for seed in (1, 1, 2))
    torch.manual_seed(99)
    alone = blocks.Block(config, 2, 1)
    for name, tensor in once[3].state_dict().items():
        assert torch.equal(tensor, again[3].state_dict()[name])
        assert torch.equal(tensor, alone.state_dict()[name])
    matrices = [name for name, tensor in once[3].state_dict().items() if tensor.dim() == 2]
    for name in matrices:
        assert not torch.equal(once[3].state_dict()[name], other[3].state_dict()[name])
        assert not torch.equal(once[3].state_dict()[name], once[2].state_dict()[name])


def test_initial_weights_are_spread_like_hugging_faces(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    theirs = from_hf(config, model.state_dict())
    for number, layer in enumerate(layers_of(config)[:-1]):
        for name, tensor in layer.state_dict().items():
            assert tensor.std().item() == pytest.approx(
                theirs[number][name].std().item(), rel=0.15, abs=1e-6
            ), (number, name)


def test_building_leaves_the_random_numbers_alone(config):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    layers_of(config)
    blocks.make_head(config, 0, 0, HeadConfig(), [0, 2, 4])
    assert torch.equal(torch.rand(3), expected)


def test_memory_does_not_grow_with_the_shapes_that_come():
    """What blocks take beside the hidden state is kept for the newest shapes, and no hidden state
    with it."""
    context = blocks.Context(families.load_model_config(MODELS["llama"]))
    for length in range(2, 40):
        context.call(torch.zeros(2, length, 32), 0)
    assert len(context._kept) <= 8
    assert (2, 39) in {tuple(shape) for shape, *_ in context._kept}
    assert {call.hidden.numel() for calls in context._kept.values() for call in calls} == {0}


def test_unsupported_families_are_named(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"supported are .*gpt2.*llama"):
        families.load_model_config({"model_type": "t5"})
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(UnsupportedModel, match="no Hugging Face model config"):
        families.load_model_config(path)
    with pytest.raises(UnsupportedModel, match="no model config at"):
        families.load_model_config(tmp_path / "missing.json")


def test_forward_flops_of_gpt2_small():
    small = families.load_model_config({"model_type": "gpt2"})
    block, readout = flops.forward_flops(small, 1024)
    assert block == 2 * 12 * 768**2 + 4 * 1024 * 768
    assert readout == 2 * 50257 * 768
