"""Errors of ours: one family, each also the built-in one that callers would expect."""

import inspect
import pickle

import pytest

from ds_local import errors
from ds_local.errors import DsLocalError, LostConnection, TransportError, first_line

OURS = [one for _, one in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error", OURS, ids=lambda one: one.__name__)
def test_each_is_of_the_family_and_says_when_it_comes(error):
    assert issubclass(error, DsLocalError)
    assert len(error.__doc__.split()) > 4
    builtin = [one for one in error.__mro__ if one.__module__ == "builtins"]
    assert error is DsLocalError or builtin[0] in (ValueError, RuntimeError, OSError)


@pytest.mark.parametrize("error", OURS, ids=lambda one: one.__name__)
def test_each_keeps_its_sentence_between_processes(error):
    back = pickle.loads(pickle.dumps(error("one sentence")))
    assert type(back) is error
    assert str(back) == "one sentence"


def test_a_lost_rank_carries_what_it_said():
    assert TransportError("gone", reason="out of memory").reason == "out of memory"
    assert TransportError("gone").reason is None
    late = LostConnection("late", late=True)
    assert (late.late, late.reason) == (True, None)
    back = pickle.loads(pickle.dumps(late))
    assert (str(back), back.late) == ("late", True)


def test_of_a_foreign_error_the_first_line_is_told():
    assert first_line(ValueError("\n  bad value\n  in line 3\n")) == "bad value"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(OSError(2, "No such file")) == "[Errno 2] No such file"
