"""Model configs: keys that only resemble real ones, and numbers that do not fit."""

import json
import math

import pytest
from sentences import assert_one_sentence
from transformers import AutoConfig

from ds_local.errors import DsLocalError
from ds_local.model.families import load_model_config

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 99}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
}


def without(config, *keys, **more):
    return {key: value for key, value in {**config, **more}.items() if key not in keys}


BAD = {
    "plural": (without(GPT2, "n_layer", n_layers=3), "'n_layers'", "'n_layer'"),
    "no underscore": (without(GPT2, "vocab_size", vocabsize=99), "'vocabsize'", "'vocab_size'"),
    "a letter too many": (without(GPT2, "n_embd", n_embed=64), "'n_embed'", "'n_embd'"),
    "another family's": (without(LLAMA, "num_hidden_layers", n_layer=3), "'n_layer'", "llama"),
    "a word left out": (without(LLAMA, "num_hidden_layers", num_layers=3), "'num_hidden_layers'"),
    "of papers": (without(GPT2, "n_embd", d_model=64), "'d_model'", "'n_embd'"),
    "of heads": (without(LLAMA, "num_attention_heads", num_heads=4), "'num_attention_heads'"),
    "of groups": ({**LLAMA, "n_kv_heads": 2}, "'n_kv_heads'", "'num_key_value_heads'"),
    "of words": ({**GPT2, "tie_words_embeddings": True}, "'tie_word_embeddings'"),
    "of a norm": ({**LLAMA, "rms_norm_epsilon": 1e-3}, "'rms_norm_epsilon'", "'rms_norm_eps'"),
    "heads that do not divide": ({**GPT2, "n_head": 5}, "n_embd is 64", "n_head, 5"),
    "heads of llama": ({**LLAMA, "num_attention_heads": 5}, "64", "5"),
    "heads of olmo2": (
        {**LLAMA, "model_type": "olmo2", "num_attention_heads": 5},
        "num_attention_heads, 5",
    ),
    "groups that do not divide": ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads, 3"),
    "groups by default": ({**LLAMA, "model_type": "mistral"}, "num_key_value_heads, 8"),
    "odd rotation": ({**LLAMA, "hidden_size": 60}, "head_dim"),
    "layers in quotes": ({**GPT2, "n_layer": "2"}, "n_layer must be an integer", "'2'"),
    "layers 0": ({**GPT2, "n_layer": 0}, "n_layer", "at least 1"),
    "layers negative": ({**LLAMA, "num_hidden_layers": -2}, "num_hidden_layers", "-2"),
    "heads 0": ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads", "at least 1"),
    "width with a fraction": ({**GPT2, "n_embd": 64.5}, "n_embd must be an integer"),
    "no vocabulary": ({**GPT2, "vocab_size": 0}, "vocab_size", "at least 1"),
    "no positions": ({**GPT2, "n_positions": 0}, "n_positions", "at least 1"),
    "inner negative": ({**GPT2, "n_inner": -3}, "n_inner", "-3"),
    "not a number": ({**GPT2, "layer_norm_epsilon": math.nan}, "layer_norm_epsilon is NaN"),
    "infinite": ({**LLAMA, "rope_parameters": {"rope_theta": math.inf}}, "rope_theta is Infinity"),
    "dropout of two": ({**GPT2, "resid_pdrop": 2.0}, "resid_pdrop", "between 0 and 1"),
    "activation": ({**GPT2, "activation_function": "gelus"}, "activation_function is 'gelus'"),
    "rotation": ({**LLAMA, "rope_scaling": {"rope_type": "round"}}, "'round'"),
    "kinds of layers": ({**LLAMA, "layer_types": ["full_attention"]}, "layer_types"),
    "family of another kind": ({**LLAMA, "model_type": "t5"}, "'t5'", "such as gpt2"),
    "family unknown": ({**LLAMA, "model_type": "lama"}, "'lama'", "such as gpt2"),
    "no family": (without(GPT2, "model_type"), "model_type"),
    "family a number": ({**GPT2, "model_type": 2}, "model_type"),
}

GOOD = {
    "gpt2": GPT2,
    "names of the attribute map": {"model_type": "gpt2", "num_hidden_layers": 3, "hidden_size": 48},
    "both": {**GPT2, "n_layers": 3},
    "of old files": {**GPT2, "n_ctx": 1024, "sep_token_id": None, "is_decoder": False},
    "notes": {**LLAMA, "license": "mit", "comment": "small", "use_mrope": False},
    "of old llamas": {
        **LLAMA,
        "max_position_embeddings": 64,
        "max_sequence_length": 2048,
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
        "pretraining_tp": 1,
    },
    "groups": {**LLAMA, "num_key_value_heads": 2, "head_dim": 32},
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant(name, tmp_path):
    config, *words = BAD[name]
    with pytest.raises(DsLocalError) as error:
        load_model_config(config)
    assert_one_sentence(error.value, *words)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(DsLocalError) as error:
        load_model_config(path)
    assert_one_sentence(error.value, *words)


@pytest.mark.parametrize("name", GOOD)
def test_what_can(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD[name]))
    for source in (GOOD[name], tmp_path / "config.json", tmp_path):
        assert load_model_config(source).model_type == GOOD[name]["model_type"]


def test_a_config_object_is_looked_at_too():
    config = AutoConfig.for_model(**GPT2)
    assert load_model_config(config) is not config
    config.n_head = 5
    with pytest.raises(DsLocalError, match="n_head, 5"):
        load_model_config(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no Hugging Face model config"), ("[]", "with a model_type"), ("", "no Hugging Face")],
)
def test_files_of_another_kind(text, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    for source in (path, "/nowhere.json", tmp_path / "none", tmp_path):
        with pytest.raises(DsLocalError) as error:
            load_model_config(source)
        assert_one_sentence(error.value, words if source == path else "", "config")
