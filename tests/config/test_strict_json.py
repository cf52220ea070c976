"""No NaN, no Infinity, nor anything else that JSON does not know."""

import json
import math

from ds_local.config.strict_json import dumps


def test_only_numbers_that_are_not_finite_change():
    value = {
        "a": [1, 2.5, math.nan, {"b": -math.inf}],
        "c": (math.inf, "NaN"),
        "d": True,
        "e": None,
    }
    assert json.loads(dumps(value)) == {
        "a": [1, 2.5, None, {"b": None}],
        "c": [None, "NaN"],
        "d": True,
        "e": None,
    }
    assert dumps(value, indent=1).count("\n") > 5
