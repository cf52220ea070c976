"""Ranks agree; one process agrees with itself. Several are in tests/dist/test_checkpoint.py."""

import pytest

from ds_local.errors import CheckpointError, SaveError
from ds_local.links.agreement import gather, together


def test_one_process_has_its_own_value():
    assert gather({"a": 1}) == [{"a": 1}]
    assert together(lambda: 7) == 7


def test_an_error_of_ours_keeps_its_class_and_its_sentence():
    def fails():
        raise SaveError("the disk is full")

    with pytest.raises(SaveError) as error:
        together(fails)
    assert str(error.value) == "the disk is full"  # no rank is named where there is one
    assert isinstance(error.value.__cause__, SaveError)


def test_an_error_that_is_not_ours_keeps_its_traceback():
    def fails():
        raise KeyError("a")

    with pytest.raises(KeyError) as error:
        together(fails)
    assert not isinstance(error.value, CheckpointError)
    assert error.traceback[-1].name == "fails"
