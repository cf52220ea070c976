"""What the planner chooses among."""

import json

import pytest
from reference import GPT2
from test_pricing import even

from ds_local.cluster.candidates import (
    ROWS,
    Candidate,
    Cluster,
    Model,
    Price,
    has_heads,
    measured_model,
    split_backward_of,
)
from ds_local.errors import ConfigError
from ds_local.model.families import load_model_config
from ds_local.model.flops import UnitCosts


def test_a_profile_replaces_the_flops(tmp_path):
    costs = {"forward": [2, 2], "input_grad": [1, 1], "weight_grad": [1, 1], "head": [0.5, 3.0]}
    facts = {
        "costs": costs,
        "layout": {"stages": 2, "segment_parts": [0, 3, 6], "sequences": 2},
        "measured": {"step_seconds": [40, 40], "update_seconds": [3, 5], "parameters": [100, 300]},
    }
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(facts))
    model = measured_model(even(2), profile)
    assert model.costs == UnitCosts(1.0, 1.5, [0.25])
    assert model.update_seconds == 8 / 400  # of a parameter
    del facts["measured"]
    profile.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="profile the run again"):
        measured_model(even(2), profile)


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
        "data parallel: 1 stages x 2 replicas, 1 x 8 sequences"
    )


def test_what_costs_most_is_said():
    one = Candidate(4, 1, "local", "full", 1, 8)
    parts = {"the model's own work": 6.0, "auxiliary heads": 1.0, "averaging gradients": 0.5}
    price = Price(one, 10.0, 80, 0.0, parts, 0.0, 0.0)
    assert price.loss == "25% of the step is waiting for other stages or links"
    assert price.tokens_per_second == 8.0
    assert Price(one, 7.5, 80, 0.0, parts, 0.0, 0.0).loss == "13% of the step is auxiliary heads"
    own = Price(one, 6.0, 80, 0.0, {"the model's own work": 6.0}, 0.0, 0.0)
    assert own.loss == "nothing much"


def test_rows_that_are_backpropagation_have_no_heads():
    without = [row for row in ROWS if not has_heads(row)]
    assert without == ["data parallel", *(row for row in ROWS if row.startswith("backprop"))]
    assert [split_backward_of(row) for row in ("local", "backprop, split 2")] == [0, 2]
    assert Cluster(3, 8, 1, 1, 1, 1).devices == 24
