"""Frames: what a model's own code gives its blocks."""

import copy

import pytest
import torch
from families import VARIANTS, layers_of
from torch import nn
from transformers import AutoModelForCausalLM

from ds_local.errors import DataError
from ds_local.model import families
from ds_local.model.anatomy import frame_of
from ds_local.model.frames import Frame


@pytest.fixture
def config():
    return families.load_model_config(VARIANTS["mistral sliding"])


def test_blocks_are_called_with_what_the_whole_model_calls_them(config):
    model, seen = AutoModelForCausalLM.from_config(config), []
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(input_ids=torch.zeros(2, 7, dtype=torch.long), use_cache=False)
    call = frame_of(config).calls_of(torch.randn(2, 7, 32), {})[1]
    assert call.args == ()
    assert torch.equal(call.kwargs["attention_mask"], seen[0]["attention_mask"])
    for ours, theirs in zip(
        call.kwargs["position_embeddings"], seen[0]["position_embeddings"], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_trace_names_what_runs_around_the_blocks(config):
    trace = Frame(families.skeleton(config), "model.layers", 0).trace()
    assert trace.before == ["model.embed_tokens", "model.rotary_emb"]
    assert trace.after == ["model.norm", "lm_head"]
    assert trace.hidden == (1, 3, 32)


def test_arguments_by_place_get_their_names():
    config = families.load_model_config(VARIANTS["gpt2"])
    call = frame_of(config).calls_of(torch.zeros(1, 5, 32), {})[0]
    assert call.args == ()
    assert {"attention_mask", "past_key_values"} <= call.kwargs.keys()


def test_what_a_model_does_not_take_is_an_error():
    bloom = families.load_model_config(
        {"model_type": "bloom", "n_layer": 2, "hidden_size": 32, "n_head": 4, "vocab_size": 64}
    )
    with pytest.raises(DataError, match="a model of type bloom takes no position_ids"):
        frame_of(bloom).calls_of(torch.zeros(1, 5, 32), {"position_ids": torch.arange(5)[None]})


def test_a_copied_embedding_uses_its_own_weights(config):
    first = layers_of(config)[0]
    copied = copy.deepcopy(first)
    with torch.no_grad():
        copied.tokens.weight.fill_(2.0)
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(copied(ids), torch.full((1, 3, 32), 2.0))
    assert torch.equal(first(ids), nn.functional.embedding(ids, first.tokens.weight))


def test_nothing_is_looked_at_on_the_device_for_the_first_hidden_state(config):
    """The library's search for packed sequences would wait for a device at every micro-batch."""
    embedding = layers_of(config)[0].to("meta")
    assert embedding(torch.zeros(2, 5, dtype=torch.long, device="meta")).shape == (2, 5, 32)
