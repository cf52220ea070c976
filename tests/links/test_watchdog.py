"""Who is waited for without waiting is named; nothing is said before a wait is long."""

import threading

from ds_local.links.notices import Absence
from ds_local.links.observer import Wait
from ds_local.links.waiting import EVERYBODY
from ds_local.links.watchdog import Watchdog, explain


def name(rank):
    return f"stage {rank} (rank {rank})"


def state(waiting=None, doing="step 6"):
    return {"doing": doing, "seconds": 70.0, "at": "user.py:7 in forward", "waiting": waiting}


def test_who_is_waited_for_without_waiting_is_named():
    answers = {
        0: state(Wait(1, "to send step 5", 70.0)),
        1: state(Wait(2, "to take step 5", 65.0)),
        2: state(),
    }
    assert explain(answers, name) == (
        "no progress: stage 2 (rank 2) has not come: in step 6 for 70 s, user.py:7 in forward; "
        "stage 0 (rank 0) has waited 70 s for stage 1 (rank 1) to send step 5; "
        "stage 1 (rank 1) has waited 65 s for stage 2 (rank 2) to take step 5"
    )


def test_who_is_gone_is_named_and_a_circle_is_one():
    waits = {0: state(Wait(1, "to send", 70.0)), 1: state(Wait(0, "to take", 70.0))}
    assert explain(waits, name).startswith("no progress: all wait for each other; stage 0")
    gone = {0: state(Wait(EVERYBODY, "in a save", 70.0)), 1: Absence.GONE}
    assert explain(gone, name) == (
        "no progress: stage 1 (rank 1) is gone: its process has ended; "
        "stage 0 (rank 0) has waited 70 s for all in a save"
    )


class Notices:
    """Of rank 0 of two; rank 1 is at work."""

    rank = 0

    def __init__(self):
        self.observer, self.seconds, self.looks = self, 0.0, threading.Semaphore(0)

    def state(self):
        self.looks.release()
        return state(Wait(1, "to send step 5", self.seconds))

    def ask_all(self, topic, seconds):
        return {0: self.state(), 1: state()}


def test_the_watchdog_speaks_once_a_wait_is_long_and_not_before():
    notices, said, spoke = Notices(), [], threading.Event()

    def say(sentence):
        said.append(sentence)
        spoke.set()

    dog = Watchdog(notices, name, 0.05, say=say)
    try:
        for _ in range(3):
            assert notices.looks.acquire(timeout=60)
        assert not said
        notices.seconds = 5.0
        assert spoke.wait(60)
    finally:
        dog.stop()
    assert said[0].startswith("no progress: stage 1 (rank 1) has not come: in step 6 for 70 s")
    assert "stage 0 (rank 0) has waited 5 s for stage 1 (rank 1) to send step 5" in said[0]
