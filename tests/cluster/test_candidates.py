"""What the planner chooses among."""

import json

import pytest
from test_pricing import even

from ds_local.cluster.candidates import measured_model
from ds_local.errors import ConfigError
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
