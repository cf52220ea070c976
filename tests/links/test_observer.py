"""What the main thread does and waits for, as another thread sees it."""

import threading

from ds_local.links.observer import Observer, Wait
from ds_local.links.waiting import EVERYBODY, waiting


def name(rank):
    return f"rank {rank}"


def test_a_wait_is_a_sentence():
    assert Wait(2, "to send step 3", 8.6).sentence("I", name) == (
        "I has waited 9 s for rank 2 to send step 3"
    )
    assert "8 s for all in a meeting" in Wait(EVERYBODY, "in a meeting", 8.0).sentence("I", name)


def test_what_is_done_is_known_until_it_ends():
    observer = Observer()
    before = observer.since
    assert observer.doing == "its start"
    with observer.during("step 3"):
        with observer.during("a save"):
            assert observer.state()["doing"] == "a save"
        assert observer.state()["doing"] == "step 3"
        assert observer.since > before
    assert (observer.doing, observer.since) == ("its start", before)


def test_an_error_ends_what_was_done():
    observer = Observer()
    try:
        with observer.during("step 3"):
            raise ValueError
    except ValueError:
        assert observer.doing == "its start"


def test_another_thread_sees_where_the_code_is():
    observer, found = Observer(), []
    thread = threading.Thread(target=lambda: found.append(observer.state()))
    thread.start()
    thread.join()
    assert " in " in found[0]["at"]
    assert found[0]["waiting"] is None


def test_the_longest_wait_is_the_one_that_is_told():
    observer = Observer()
    with waiting(3, "to send step 1"), waiting(4, "to send step 2"):
        rank, purpose, seconds = observer.state()["waiting"]
    assert (rank, purpose) == (3, "to send step 1")
    assert seconds >= 0
    assert observer.state()["waiting"] is None


def test_a_function_of_torch_distributed_is_a_wait_for_everybody():
    """Seen twice in the same call, the wait is counted from the first look."""
    asked, answer = threading.Lock(), threading.Lock()
    asked.acquire()
    answer.acquire()
    inside = compile(
        "def barrier(asked, answer):\n    asked.release(); answer.acquire()\n",
        "/somewhere/torch/distributed/made_up.py",
        "exec",
    )
    space = {}
    exec(inside, space)
    observer, found = Observer(), []

    def look():
        asked.acquire()
        found.extend([observer.state(), observer.state()])
        answer.release()

    thread = threading.Thread(target=look)
    thread.start()
    with observer.during("step 5"):
        space["barrier"](asked, answer)
    thread.join()
    first, second = (state["waiting"] for state in found)
    assert (first.rank, first.purpose) == (EVERYBODY, "in step 5")
    assert first.seconds == 0.0 < second.seconds
    assert found[0]["at"].startswith("test_observer.py:")
