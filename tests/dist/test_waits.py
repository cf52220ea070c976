"""Where ranks wait for each other: with a limit, with a name, and together at the end."""

import time

import pytest
from ranks import free_port, run_ranks

LIMIT = {"timeout_seconds": 4.0}
PATIENCE = 90.0  # of a test, not of the package


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


# --- one rank stays away --------------------------------------------------------------------------


def one_stays_away(section, stages, absent, what):
    """What ends each of the others; of the one who is absent, what it is told."""
    import jobs

    from ds_local.errors import TransportError

    engine = jobs.build(section, stages)
    data = jobs.batches(engine)
    engine.train_batch(data)
    engine.eval_batch(jobs.batches(engine, start=100))  # all have done the step
    if engine.global_rank == absent:
        wait_until(lambda: engine.failures.first)
        return engine.failures.first
    try:
        for _ in range(20):  # a stage may run ahead
            {
                "a step": lambda: engine.train_batch(data),
                "a save": lambda: engine.save_checkpoint("/nowhere/that/is/written"),
                "an evaluation": lambda: engine.eval_batch(jobs.batches(engine, start=100)),
            }[what]()
    except TransportError as error:
        return str(error)


@pytest.mark.parametrize(
    ("section", "ranks", "stages", "absent", "what"),
    [
        ({"mode": "local"}, 2, 2, 1, "a step"),  # its neighbour below waits
        ({"mode": "local"}, 3, 3, 0, "a step"),  # those above
        ({"mode": "backprop"}, 3, 3, 2, "a step"),
        ({"mode": "local"}, 2, 1, 1, "a step"),  # gradients are averaged
        ({"mode": "local", "replicas": {"sync": "periodic", "every": 1}}, 2, 1, 0, "a step"),
        ({"mode": "local"}, 2, 2, 0, "a save"),
        ({"mode": "local"}, 3, 3, 1, "an evaluation"),
    ],
)
def test_who_stays_away_is_named_within_the_limit(section, ranks, stages, absent, what):
    section = {**section, "link": LIMIT}
    ended = run_ranks(one_stays_away, ranks, section, stages, absent, what)
    stage = absent if stages > 1 else 0
    for rank, words in enumerate(ended):
        assert f"stage {stage} (rank {absent}) has not come" in words, ended
        others = set(range(ranks)) - {absent, rank}
        assert not any(f"rank {other}" in words for other in others), ended


# --- leaving together -----------------------------------------------------------------------------


def stopped_in_an_evaluation(stages, asks):
    import jobs

    engine = jobs.build({"mode": "local"}, stages)
    engine.train_batch(jobs.batches(engine))
    read = []

    def data():
        for number in range(1000):
            if number == 3 and engine.global_rank == asks:
                engine.request_stop()
            if number == 3:  # the word goes round beside the main threads
                wait_until(lambda: engine._stopping.pending)
            read.append(number)
            yield jobs.batch(100 + number, 0, engine.replica_id)

    if engine.global_rank == asks and not engine.is_first_stage():
        engine.request_stop()
    batches = data() if engine.is_first_stage() else None
    engine.eval_batch(batches, num_micro_batches=1000)
    return engine.should_stop, len(read)


@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("asks", ["first", "last"])
def test_an_evaluation_ends_early_when_a_rank_is_told_to_stop(ranks, stages, asks):
    ended = run_ranks(stopped_in_an_evaluation, ranks, stages, 0 if asks == "first" else ranks - 1)
    assert all(should_stop for should_stop, _ in ended)
    assert all(read <= 5 for _, read in ended)


def stopped_in_a_save(folder):
    import jobs

    engine = jobs.build({"mode": "local"}, 2)
    engine.train_batch(jobs.batches(engine))
    if engine.global_rank == 1:
        engine.request_stop()
    engine.save_checkpoint(folder)
    return engine.should_stop, engine.global_steps


def test_after_a_save_no_further_step_is_needed(tmp_path):
    assert run_ranks(stopped_in_a_save, 2, str(tmp_path)) == [(True, 1)] * 2


def two_engines():
    import jobs

    first = jobs.build({"mode": "local"}, 2)
    data = jobs.batches(first)
    if first.global_rank == 1:
        first.request_stop()
    while not first.should_stop:
        first.train_batch(data)
    first.failures.report("of the first engine")
    first.destroy()
    second = jobs.build({"mode": "local"}, 2)
    data = jobs.batches(second)
    for _ in range(4):
        second.train_batch(data)
    second.eval_batch(jobs.batches(second, start=100))
    return first.failures.first, second.failures.first, second.should_stop, second.global_steps


def test_a_second_engine_hears_nothing_of_the_first():
    assert run_ranks(two_engines, 2) == [("of the first engine", None, False, 4)] * 2


# --- beside the steps -----------------------------------------------------------------------------


def words_in_steps():
    import threading
    from unittest import mock

    import jobs

    from ds_local.links.notices import Notices

    engine = jobs.build({"mode": "local"}, 2)
    data = jobs.batches(engine)
    engine.train_batch(data)
    asked, started = [], []
    ask, start = Notices.ask, threading.Thread.start
    main = threading.current_thread()

    def counted(calls, method):
        def call(*args, **kwargs):
            if threading.current_thread() is main:
                calls.append(args)
            return method(*args, **kwargs)

        return call

    with (
        mock.patch.object(Notices, "ask", counted(asked, ask)),
        mock.patch.object(threading.Thread, "start", counted(started, start)),
    ):
        for _ in range(3):
            engine.train_batch(data)
    engine.eval_batch(jobs.batches(engine, start=100))
    return len(asked), len(started)


def test_a_step_asks_nobody_and_starts_no_thread():
    assert run_ranks(words_in_steps, 2) == [(0, 0)] * 2


def ported(port):
    """As a script that starts the processes itself, at a port where no store is about to close."""
    import os

    import deepspeed
    import jobs
    import torch.distributed as dist

    from ds_local.engine.process_group import end_processes
    from ds_local.links import notices

    end_processes()
    os.environ["MASTER_PORT"] = str(port)
    deepspeed.init_distributed()
    engine = jobs.build({"mode": "local", "link": {"timeout_seconds": 33.0}}, 2)
    engine.train_batch(jobs.batches(engine))
    engine.eval_batch(jobs.batches(engine, start=100))
    limit = dist.group.WORLD._get_backend(engine.device).options._timeout
    return limit.total_seconds(), len(notices.current().cards), engine.watchdog is not None


def test_a_script_may_start_the_processes_itself():
    assert run_ranks(ported, 2, free_port()) == [(33.0, 2, True)] * 2
