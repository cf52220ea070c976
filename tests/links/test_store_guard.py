"""Waits through the store have a limit."""

import time

import pytest

from ds_local.links.store_guard import limited


def test_what_is_in_time_is_handed_on():
    assert limited(lambda: 3, 5.0) == 3
    with pytest.raises(KeyError, match="here"):
        limited(lambda: {}["here"], 5.0)


def test_what_is_late_is_left_behind():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        limited(lambda: time.sleep(30), 0.2)
    assert time.monotonic() - began < 20
