"""Seconds of training."""

from contextlib import suppress
from types import SimpleNamespace

import pytest

from ds_local.training import clock


@pytest.fixture
def now(monkeypatch):
    """The time, to be set."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: time.now)
    return time


def test_it_stands_until_the_first_step_is_done(now):
    made = clock.Clock(7.0)
    now.now += 50
    assert made.seconds == 7.0
    made.start()
    now.now += 2.5
    made.start()
    assert made.seconds == 9.5


def test_pauses_do_not_count_and_may_lie_in_each_other(now):
    made = clock.Clock()
    with made.paused():
        now.now += 1
    made.start()
    now.now += 2
    with made.paused():
        now.now += 4
        with suppress(OSError), made.paused():
            now.now += 8
            raise OSError
        now.now += 16
    now.now += 1
    assert made.seconds == 3


def test_it_stands_during_a_pause(now):
    made = clock.Clock()
    made.start()
    now.now += 2
    with made.paused():
        now.now += 4
        with made.paused():
            now.now += 8
            assert made.seconds == 2
    assert made.seconds == 2
