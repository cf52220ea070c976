"""Every config in configs/ can be used as it is."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from ds_local.cluster.surroundings import read_hostfile
from ds_local.config.deepspeed import batch_sizes, check_deepspeed
from ds_local.config.files import load_config, local_parallel
from ds_local.model import families
from ds_local.model.flops import choose_parts
from ds_local.schedules.run_plan import RunPlan

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(set(CONFIGS.glob("*.json")) - set(CONFIGS.glob("*.schema.json")))
DEEPSPEED = sorted((CONFIGS / "deepspeed").glob("*.json"))

# millions of parameters with a readout of its own; GPT-2's published sizes share it with the
# embedding
MILLIONS = {
    "gpt2-nano": 1.858,
    "gpt2-small": 163.037,
    "gpt2-medium": 406.286,
    "gpt2-large": 838.359,
    "gpt2-xl": 1638.022,
    "llama-1b": 1100.048,
}
TIED = {"gpt2-small": 124.440, "gpt2-medium": 354.823, "gpt2-large": 774.030, "gpt2-xl": 1557.611}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_models_load_and_have_their_size(path):
    config = families.load_model_config(path)
    size = sum(p.numel() for p in families.skeleton(config).parameters())
    assert size / 1e6 == pytest.approx(MILLIONS[path.stem], abs=1e-3)
    if path.stem in TIED:
        assert (size - config.vocab_size * config.hidden_size) / 1e6 == pytest.approx(
            TIED[path.stem], abs=1e-3
        )
    assert not config.tie_word_embeddings
    assert set(json.loads(path.read_text())) >= {
        "model_type",
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
    }


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_configs_fit_their_models(path):
    config = load_config(path)
    check_deepspeed(config)
    section = local_parallel(config)
    assert config["bf16"]["enabled"]
    assert config["zero_optimization"]["stage"] == 1
    model = families.load_model_config(CONFIGS / path.name)
    for stages, replicas in ((2, 4), (4, 2), (8, 1)):
        _, micro_batches = batch_sizes(config, replicas)
        assert RunPlan(section, stages, micro_batches).schedules
        parts = choose_parts(model, section, stages, micro_batches, families.num_positions(model))
        assert parts[-1] == families.num_blocks(model) + 2
        assert min(b - a for a, b in pairwise(parts)) >= 1


def test_full_size_models_have_a_deepspeed_config():
    assert {path.stem for path in MODELS} - {"gpt2-nano"} == {path.stem for path in DEEPSPEED}


def test_the_hostfile_example_can_be_read():
    assert len(read_hostfile(CONFIGS / "hostfile")) == 2
