"""Smaller models of a config: prefixes of the same blocks, small ones that have every kind."""

import pytest
from families import VARIANTS
from transformers import CONFIG_MAPPING

from ds_local.errors import UnsupportedModel
from ds_local.model import families
from ds_local.model.family_check import tried
from ds_local.model.small_models import NoPrefix, kinds, prefix, shrunk


def test_a_prefix_keeps_what_is_given_for_each_block():
    config = families.load_model_config(VARIANTS["qwen3 half sliding, tied"])
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    shorter = prefix(config, 3)
    assert shorter.num_hidden_layers == families.num_blocks(shorter) == 3
    assert shorter.layer_types == config.layer_types[:3]
    assert len(config.layer_types) == 4
    assert kinds(shorter)[0] == kinds(shorter)[1] != kinds(shorter)[2]


def test_lists_that_mean_something_else_stay_whole():
    config = CONFIG_MAPPING["gpt_neo"](num_layers=4, attention_types=[[["global", "local"], 2]])
    shorter = prefix(config, 3)
    assert list(shorter.attention_layers) == ["global", "local", "global"]
    assert len(shorter.attention_types) == 3
    two_ends = CONFIG_MAPPING["llama"](num_hidden_layers=2, eos_token_id=[1, 2])
    assert prefix(two_ends, 1).eos_token_id == [1, 2]


def test_blocks_that_know_how_many_there_are_are_no_prefix():
    with pytest.raises(UnsupportedModel, match="depends on how many there are"):
        prefix(CONFIG_MAPPING["gpt_neox_japanese"](num_hidden_layers=4), 2)
    with pytest.raises(NoPrefix, match="first 1 blocks are no model by themselves"):
        prefix(CONFIG_MAPPING["olmo_hybrid"](num_hidden_layers=8), 1)


def test_a_small_model_has_every_kind_of_block_and_the_users_own_numbers():
    config = CONFIG_MAPPING["gemma2"](final_logit_softcapping=7.0)
    small = shrunk(config, tried)
    assert small.hidden_size == 64
    assert (small.num_hidden_layers, small.final_logit_softcapping) == (2, 7.0)
    assert set(small.layer_types) == set(config.layer_types)
    late = CONFIG_MAPPING["qwen2"](
        num_hidden_layers=12, use_sliding_window=True, max_window_layers=9, sliding_window=99
    )
    small = shrunk(late, tried)
    assert (small.num_hidden_layers, small.sliding_window) == (10, 4)
