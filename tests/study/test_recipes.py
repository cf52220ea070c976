"""The models of the studies."""

import pytest

from ds_local.model.families import load_model_config
from ds_local.study.recipes import PRESETS, gpt2


def test_weights_are_drawn_as_widely_as_those_of_gpt2_small_for_their_width():
    assert gpt2(12, 768, 12, 50257, 1024)["initializer_range"] == 0.02
    assert gpt2(8, 192, 4, 512, 64)["initializer_range"] == 0.04


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_model(preset):
    facts = PRESETS[preset]
    config = load_model_config(dict(facts.model))
    assert f"sentencepiece:{config.vocab_size}" == facts.tokenizer
    assert facts.step_tokens == facts.sequences * config.n_positions
