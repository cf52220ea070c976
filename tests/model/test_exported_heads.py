"""Heads filled from a folder that we exported: from the model's own weights, or whole."""

import json

import pytest
import torch
from reference import GPT2
from safetensors.torch import save_file
from sentences import assert_one_sentence

from ds_local.config.sections import HeadConfig
from ds_local.errors import WeightsError
from ds_local.model import blocks, families
from ds_local.model.exported_heads import load_head
from ds_local.model.pretrained import HEADS_FILE, Weights

PARTS = [0, 2, 4, 6]  # three segments


@pytest.fixture(scope="module")
def config():
    return families.load_model_config({**GPT2, "tie_word_embeddings": False})


@pytest.fixture
def folder(tmp_path, config):
    """A model's folder; every tensor has numbers of its own."""
    state = families.skeleton(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator) for name, t in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path, state


def make(config, segment=0, seed=3, **how):
    how = HeadConfig(**how)
    return blocks.make_head(config, segment, seed, how, PARTS), how


def loaded(config, place, segment=0, parts=PARTS, **options):
    head, how = make(config, segment, **options)
    load_head(head, segment, how, parts, Weights(place, config))
    return head.state_dict()


def test_a_head_of_its_own_stays_as_it_is(config, folder):
    fresh = make(config)[0].state_dict()
    for name, tensor in loaded(config, folder[0]).items():
        assert torch.equal(tensor, fresh[name])


def test_norm_and_readout_start_as_the_models(config, folder):
    place, state = folder
    found = loaded(config, place, init="model")
    assert torch.equal(found["readout.weight"], state["lm_head.weight"])
    assert torch.equal(found["norm.bias"], state["transformer.ln_f.bias"])
    shared = loaded(config, place, readout="shared")
    assert torch.equal(shared["readout.weight"], state["lm_head.weight"])
    assert not torch.equal(shared["norm.bias"], state["transformer.ln_f.bias"])


def test_copied_blocks_are_the_next_segments_first(config, folder):
    place, state = folder
    found = loaded(config, place, blocks=1, blocks_from="next")
    # segment 0 has the embedding and block 0, so the next segment begins with block 1
    name = next(name for name in found if name.endswith("mlp.c_fc.weight"))
    assert torch.equal(found[name], state["transformer.h.1.mlp.c_fc.weight"])


def exported(config, place, parts=PARTS, **options):
    state = {k: torch.full_like(v, 7.0) for k, v in make(config, **options)[0].state_dict().items()}
    save_file(
        {f"segment_0.{name}": tensor for name, tensor in state.items()},
        place / HEADS_FILE,
        {"segment_parts": json.dumps(parts)},
    )


def test_exported_heads_are_taken_whole_where_the_cut_is_the_same(config, folder):
    place, _ = folder
    exported(config, place)
    assert all((tensor == 7.0).all() for tensor in loaded(config, place, init="model").values())
    exported(config, place, parts=[0, 3, 4, 6])
    found = loaded(config, place, init="model")
    assert torch.equal(found["readout.weight"], folder[1]["lm_head.weight"])


def test_heads_of_another_make_are_named(config, folder):
    place, _ = folder
    exported(config, place, rank=4)
    with pytest.raises(WeightsError) as error:
        loaded(config, place)
    assert_one_sentence(
        error.value, "head of segment 0 has ['down.weight'] too much", "use the head options"
    )
    with pytest.raises(WeightsError, match=r"tensor segment_0\.\S+ has shape \[.*\], this run"):
        loaded(config, place, rank=8)


def test_a_damaged_file_is_named(config, folder):
    place, _ = folder
    (place / HEADS_FILE).write_bytes(b"x" * 100)
    with pytest.raises(WeightsError, match=f"cannot read {place / HEADS_FILE}"):
        loaded(config, place)
