"""What the planner chooses among."""

import json

import pytest
from reference import GPT2
from sentences import one_sentence
from test_pricing import even

from ds_local.cluster.candidates import (
    PLANNED,
    Candidate,
    Cluster,
    Model,
    has_heads,
    measured_model,
    split_backward_of,
)
from ds_local.errors import ConfigError
from ds_local.model.families import load_model_config
from ds_local.model.flops import UnitCosts

COSTS = {"forward": [2, 2], "input_grad": [1, 1], "weight_grad": [1, 1], "head": [0.5, 3.0]}


def profile_of(folder, parts=(0, 3, 6), **layout):
    """Of a run of four blocks on two stages."""
    facts = {
        "costs": COSTS,
        "layout": {"stages": 2, "segment_parts": parts, "sequences": 2} | layout,
        "measured": {"step_seconds": [40, 40], "update_seconds": [3, 5], "parameters": [100, 300]},
    }
    path = folder / "profile.json"
    path.write_text(json.dumps(facts))
    return path, facts


def test_a_profile_replaces_the_flops(tmp_path):
    profile, facts = profile_of(tmp_path, seq_len=7)
    model = measured_model(even(4), profile)
    assert model.costs == UnitCosts(1.0, 1.5, [0.25])
    assert model.update_seconds == 8 / 400  # of a parameter
    assert model.seq_len == 7
    del facts["measured"]
    profile.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="profile the run again"):
        measured_model(even(4), profile)


def test_a_profile_knows_its_sequences(tmp_path):
    profile, _ = profile_of(tmp_path, seq_len=7)
    assert measured_model(even(4), profile, 7).seq_len == 7
    with one_sentence("--seq-len is 10", "sequences of 7", "leave --seq-len out"):
        measured_model(even(4), profile, 10)
    older, _ = profile_of(tmp_path)
    assert measured_model(even(4), older, 10).seq_len == 10
    with one_sentence(str(older), "give the seq_len of that run's data as --seq-len"):
        measured_model(even(4), older)


def test_a_profile_is_of_one_model(tmp_path):
    profile, _ = profile_of(tmp_path, seq_len=7)
    with one_sentence("a model of 4 blocks, but --model has 6", "profile a run of this one"):
        measured_model(even(6), profile)


def test_sizes_of_a_model_are_counted_by_hand():
    model = Model.of(load_model_config(GPT2))
    # width 32: attention 4 x 32 x 32, MLP 8 x 32 x 32, their biases 9 x 32, two norms 4 x 32
    assert model.block_params == 12 * 32**2 + 9 * 32 + 4 * 32
    assert (model.depth, model.hidden, model.seq_len) == (4, 32, 16)
    assert model.readout_params == 64 * 32
    # tokens, positions, and the last norm; a tied readout is counted as one of its own
    assert model.embedding_params == 64 * 32 + 16 * 32 + 2 * 32
    # inputs and outputs of the four products: 32 + 96, 32 + 32, 32 + 128, 128 + 32
    assert model.kept == 128 + 64 + 160 + 160
    assert Model.of(load_model_config(GPT2), 8).seq_len == 8


def test_a_candidate_is_a_line():
    one = Candidate(4, 2, "local", "full", 8, 16, "within_node", recompute=True)
    assert str(one) == (
        "local (full heads): 4 stages within node x 2 replicas, 16 x 8 sequences, recomputing"
    )
    assert str(Candidate(1, 2, "data parallel", "", 8, 1)) == (
        "data parallel: 1 stage x 2 replicas, 1 x 8 sequences"
    )


def test_rows_that_are_backpropagation_have_no_heads():
    without = [scheme for scheme in PLANNED if not has_heads(scheme)]
    assert without == [
        "data parallel",
        *(scheme for scheme in PLANNED if scheme.startswith("backprop")),
    ]
    assert [split_backward_of(scheme) for scheme in ("local", "backprop, split 2")] == [0, 2]
    assert Cluster(3, 8, 1, 1, 1, 1).devices == 24
