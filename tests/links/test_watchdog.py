import logging
from types import SimpleNamespace

from ds_local.links import watchdog
from ds_local.links.watchdog import Wait, Watchdog, explain, longest_wait, start_log


def end(stage, rank, since, purpose="to send step 5", name="activation link 0 -> 1"):
    waiting = None if since is None else (since, purpose)
    return SimpleNamespace(peer=SimpleNamespace(stage=stage, rank=rank), name=name, waiting=waiting)


def test_the_longest_wait_counts():
    links = [end(0, 0, None), end(2, 2, 40.0), end(0, 0, 10.0)]
    wait = longest_wait(1, 1, links, now=100.0)
    assert wait == Wait(1, 1, 0, 0, "to send step 5 on the activation link 0 -> 1", 90.0)
    assert (
        str(wait)
        == "stage 1 (rank 1) has waited 90 s for stage 0 (rank 0) to send step 5 on the activation link 0 -> 1"
    )
    assert longest_wait(1, 1, [end(0, 0, None), SimpleNamespace()], now=100.0) is None


def test_who_is_waited_for_without_waiting_is_named():
    waits = {
        0: Wait(0, 0, 1, 1, "to take", 70),
        1: Wait(1, 1, 2, 2, "to take", 65),
        3: Wait(3, 3, 2, 2, "to send", 61),
    }
    assert explain(waits).startswith(
        "no progress: all wait for stage 2 (rank 2); stage 0 (rank 0) has waited 70 s for stage 1"
    )
    circle = {0: Wait(0, 0, 1, 1, "to take", 70), 1: Wait(1, 1, 0, 0, "to send", 70)}
    assert "each other in a circle" in explain(circle)


def test_the_watchdog_speaks_once_a_wait_is_long_and_not_before(monkeypatch):
    notices = {}
    monkeypatch.setattr(watchdog, "change_notice", notices.__setitem__)
    monkeypatch.setattr(watchdog, "read_notice", notices.get)
    clock, said = [0.0], []
    monkeypatch.setattr(watchdog.time, "perf_counter", lambda: clock[0])
    dog = Watchdog(0, 0, 2, lambda: [end(1, 1, 0.0)], 0.02, said.append)
    dog._stopped.wait(0.1)
    assert not said
    clock[0] = 5.0
    dog._stopped.wait(0.3)
    dog.stop()
    assert said[0].startswith(
        "no progress: all wait for stage 1 (rank 1); stage 0 (rank 0) has waited 5 s for stage 1 (rank 1)"
    )


def test_every_rank_has_a_log_of_its_own(tmp_path):
    before = {name: list(logging.getLogger(name).handlers) for name in ("ds_local", "DeepSpeed")}
    try:
        path = start_log(tmp_path / "logs", 1, 3)
        logging.getLogger("ds_local").info("hello")
        logging.getLogger("DeepSpeed").warning("there")
        lines = path.read_text().splitlines()
    finally:
        for name, handlers in before.items():
            for handler in set(logging.getLogger(name).handlers) - set(handlers):
                logging.getLogger(name).removeHandler(handler)
                handler.close()
    assert path.name == "rank-003.log"
    assert [line.partition(" stage 1 rank 3 ")[2].split(" ", 2)[1:] for line in lines] == [
        ["INFO", "hello"],
        ["WARNING", "there"],
    ]
