"""The base of our config classes, on a class of its own."""

from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import ValidationError

from ds_local.config.strict import OptionOf, Strict


class Small(Strict):
    kind: Literal["plain", "fast", "slow"] = "plain"
    """Which."""
    many: tuple[Literal["plain", "fast", "slow"], ...] = ()
    """Several."""
    speed: Annotated[float, OptionOf("kind", ("fast", "slow"))] = 1.0
    """Of fast and slow."""
    beside: Annotated[int, OptionOf("many", ("slow",))] = 1
    """Of a list with slow in it."""
    size: int = 3
    """How large."""
    renamed: ClassVar = {"length": "size"}


def refused(words, **given):
    with pytest.raises(ValidationError, match=words):
        Small(**given)


def test_keys_kinds_and_numbers_are_strict():
    refused("Extra inputs are not permitted", sise=3)
    refused("valid integer", size="3")
    refused("valid integer", size=True)
    refused("finite number", kind="fast", speed=float("nan"))
    with pytest.raises(ValidationError, match="frozen"):
        Small().size = 4


def test_json_writes_integers_as_floats_and_tuples_as_lists():
    found = Small(size=1e3, many=["fast", "slow"])
    assert (found.size, found.many) == (1000, ("fast", "slow"))
    assert type(found.size) is int
    refused("valid integer", size=1.5)


def test_an_option_that_is_not_in_use_is_refused_with_what_would_use_it():
    assert Small(kind="slow", speed=2.0).speed == 2.0
    assert Small(many=["plain", "slow"], beside=2).beside == 2
    refused(
        "speed means nothing with kind 'plain'; remove it, or set kind to fast or slow", speed=2.0
    )
    refused("beside means nothing with many", many=["fast"], beside=2)
    assert set(Small.options()) == {"speed", "beside"}


def test_an_old_name_is_read_with_a_warning():
    with pytest.warns(FutureWarning, match="length is called size now; rename it"):
        assert Small(length=7).size == 7
    refused("length is the old name of size, and both are there", length=7, size=7)


def test_the_schema_has_the_conditions_and_the_meanings():
    schema = Small.model_json_schema()
    assert schema["properties"]["size"]["description"] == "How large."
    assert schema["additionalProperties"] is False
    first = schema["allOf"][0]
    assert first["if"] == {"required": ["speed"]}
    assert first["then"]["properties"]["kind"]["anyOf"][0] == {"enum": ["fast", "slow"]}
