"""Of what kind a value is; what will be made of it, tried out."""

import logging
from typing import Optional, Union

import pytest
from deepspeed.utils import logger
from sentences import assert_one_sentence
from torch import Tensor

from ds_local.engine.value_checks import check_builds, check_keys, check_kind
from ds_local.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, bool),
        (3, int),
        (3.0, int),
        (0.5, float),
        (1, float),
        ("a", str),
        ({}, dict),
        (None, Optional[float]),  # noqa: UP045 - as torch's optimizers write it
        (0.5, Union[float, Tensor]),  # noqa: UP007
        (None, float | None),
        ("anything", None),
    ],
)
def test_values_of_their_kind(value, kind):
    check_kind("a", value, kind)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (1, bool, "a must be true or false, got 1"),
        (True, int, "a must be an integer, got True"),
        (1.5, int, "a must be an integer, got 1.5"),
        ("1e-3", float, "a must be a number, got '1e-3'; remove the quotes"),
        ("true", bool, "a must be true or false, got 'true'; remove the quotes"),
        ("fast", float, "a must be a number, got 'fast'"),
        (None, float, "a must be a number, got None"),
        ("x", float | Tensor, "a must be a number, got 'x'"),
        ([], dict, "a must be an object with keys of its own, got []"),
    ],
)
def test_values_of_another_kind(value, kind, said):
    with pytest.raises(ConfigError) as error:
        check_kind("a", value, kind)
    assert str(error.value) == said


def test_a_key_is_named_from_the_top():
    check_keys(("x", "y"), {"lr": 1}, {"lr": float})
    for given, said in (
        ({"lrr": 1}, "x.y.lrr is not a key DeepSpeed knows; did you mean 'lr'?"),
        ({"lr": "a"}, "x.y.lr must be a number, got 'a'"),
        ([1], "x.y must be an object with keys of its own, got [1]"),
    ):
        with pytest.raises(ConfigError) as error:
            check_keys(("x", "y"), given, {"lr": float})
        assert str(error.value) == said


def build(a=1, b=1):
    logger.warning("loud")
    if a > 5:
        raise ValueError("a is too large. See https://example.org/a. It is\nreally")
    if a == b == 0:
        raise AssertionError


def test_the_value_without_which_it_works_is_named(caplog):
    with pytest.raises(ConfigError) as error:
        check_builds("params.{}", "it does not work", build, {"b": 2, "a": 9})
    assert str(error.value) == "params.a is 9: a is too large; It is"
    assert isinstance(error.value.__cause__, ValueError)


def test_what_is_no_single_value_is_said_as_a_whole():
    def never(**given):
        raise AssertionError

    with pytest.raises(ConfigError) as error:
        check_builds("params.{}", "it does not work", never, {"a": 0, "b": 0})
    assert_one_sentence(error.value, "it does not work: AssertionError")


def test_what_is_tried_out_is_silent_and_the_logger_speaks_again(caplog):
    with caplog.at_level(logging.WARNING):
        check_builds("{}", "", build, {"a": 1})
    assert "loud" not in caplog.text
    assert not logger.disabled
