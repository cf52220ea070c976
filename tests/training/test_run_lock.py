"""The lock of a run folder: one owner at a time, and a dead one is no obstacle."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from killed import in_child, killed_everywhere

from ds_local.errors import RunError
from ds_local.training import run_lock
from ds_local.training.run_lock import NAME, RunLock


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "one"


def hold(run):
    """A process that has the lock; killing it is the caller's."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            RunLock(run).acquire()
            os.write(write, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.read(read, 1)
    os.close(read), os.close(write)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_start_is_refused_with_the_owner_by_name(run):
    owner = hold(run)
    try:
        facts = json.loads((run / NAME).read_text())
        assert facts["pid"] == owner
        assert {"host", "started", "since"} <= facts.keys()
        before = sorted(run.iterdir())
        with pytest.raises(
            RunError,
            match=f"in use by process {owner} on {facts['host']} since {facts['since'][:10]}",
        ):
            RunLock(run).acquire()
        assert sorted(run.iterdir()) == before
    finally:
        end(owner)


def test_a_killed_owner_is_no_obstacle(run):
    end(hold(run))
    assert (run / NAME).exists()
    lock = RunLock(run)
    lock.acquire()
    lock.check()
    assert json.loads((run / NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(run.iterdir()) == []


def test_a_start_that_comes_to_nothing_leaves_nothing(run):
    lock = RunLock(run)
    lock.acquire()
    lock.release()
    assert not run.parent.exists()


def test_a_stopped_owner_keeps_its_folder(run):
    owner = hold(run)
    os.kill(owner, signal.SIGSTOP)
    try:
        with pytest.raises(RunError, match="in use"):
            RunLock(run).acquire()
    finally:
        end(owner)


def test_of_many_starts_at_once_one_wins(run):
    end(hold(run))  # a dead owner's lock is there too
    barrier = multiprocessing.Barrier(8)
    winners = multiprocessing.Value("i", 0)
    done = multiprocessing.Event()

    def start():
        barrier.wait(30)
        try:
            RunLock(run).acquire()
        except RunError:
            return
        with winners.get_lock():
            winners.value += 1
        done.wait(30)

    for _ in range(5):
        done.clear()
        starts = [multiprocessing.get_context("fork").Process(target=start) for _ in range(8)]
        for process in starts:
            process.start()
        deadline = time.monotonic() + 30
        while sum(p.is_alive() for p in starts) > 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        while not winners.value and time.monotonic() < deadline:
            time.sleep(0.02)
        assert winners.value == 1
        done.set()
        for process in starts:
            process.join()
        winners.value = 0


def test_killed_at_any_file_operation_a_start_is_no_obstacle(run):
    def start():
        lock = RunLock(run)
        lock.acquire()
        lock.release()

    for _ in killed_everywhere(start, run):
        assert in_child(start) == 0


def elsewhere(run, **change):
    """Make the lock one of another host."""
    run.mkdir(parents=True, exist_ok=True)
    facts = {
        "host": "node7",
        "place": "x",
        "pid": 12,
        "started": "34",
        "since": "2026-01-02",
        **change,
    }
    (run / NAME).write_text(json.dumps(facts))
    return run / NAME


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 2.0)


def test_an_owner_elsewhere_that_shows_life_keeps_its_folder(run, quick):
    path = elsewhere(run)
    ended = threading.Event()

    def live():
        while not ended.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        said = []
        with pytest.raises(RunError, match="process 12 on node7 since 2026-01-02"):
            RunLock(run, said.append).acquire()
        assert "waiting 2 s for a sign of life" in said[0]
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"pid": 1}'])
def test_a_silent_owner_elsewhere_and_a_damaged_lock_are_taken_over(run, quick, content):
    path = elsewhere(run)
    if content is not None:
        path.write_text(content)
    lock = RunLock(run)
    began = time.monotonic()
    lock.acquire()
    assert time.monotonic() - began >= 1.5
    lock.check()
    lock.release()


def test_who_was_taken_for_dead_ends_before_it_writes(run, quick):
    lock = RunLock(run)
    lock.acquire()
    elsewhere(run)
    with pytest.raises(RunError, match="taken over by another process"):
        lock.check()
    deadline = time.monotonic() + 20
    while not lock.is_lost:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lock.release()
    assert (run / NAME).exists()  # it is another's


def test_a_file_system_without_links_will_do(run, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(run_lock.os, "link", no_links)
    lock = RunLock(run)
    lock.acquire()
    lock.check()
    assert in_child(lambda: RunLock(run).acquire()) == 1
    lock.release()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot write to .*Not a directory; choose another --output"
    ):
        RunLock(tmp_path / "file" / "run").acquire()
    with pytest.raises(RunError, match="cannot write to"):
        RunLock(tmp_path / "file").acquire()
