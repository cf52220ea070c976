"""All ranks of stage 0 name the same last step, whoever asks and however far each has come."""

import random
import threading

import pytest

from ds_local.engine.stopping import Stopping


class Notices:
    """Of one rank, beside those of all others."""

    def __init__(self, rank, everybody):
        self.rank, self.everybody, self.handlers = rank, everybody, {}
        everybody[rank] = self

    def answer(self, topic, handler):
        self.handlers[topic] = handler

    def ask(self, rank, topic, **question):
        return self.everybody[rank].handlers[topic](question) or {}

    def ask_all(self, topic, ranks, **question):
        return {rank: self.ask(rank, topic, **question) for rank in ranks if rank != self.rank}


def test_a_rank_alone_stops_after_the_step_that_begins():
    stopping = Stopping(None, 1, [0])
    assert not stopping.is_last(0)
    stopping.requested = True
    assert stopping.is_last(1)


def test_one_replica_decides_by_itself_whoever_asks():
    everybody = {}
    first, other = (Stopping(Notices(rank, everybody), 1, [0]) for rank in range(2))
    assert not first.is_last(0)
    other.requested = True
    other.arrange()
    assert first.pending
    assert first.is_last(1)


def test_a_second_engine_does_not_obey_the_stop_of_the_first():
    everybody = {}
    notices = [Notices(rank, everybody) for rank in range(2)]
    first = [Stopping(one, 1, [0, 1]) for one in notices]
    second = [Stopping(one, 2, [0, 1]) for one in notices]
    first[1].requested = True
    for one in (first[1], first[0]):
        one.arrange()
    assert all(one.pending for one in first)
    assert not any(one.pending for one in second)
    assert not any(one.is_last(0) for one in second)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("together", [True, False], ids=["in step", "apart"])
def test_replicas_agree(seed, together):
    """Replicas run on threads; where they average gradients none is ahead of another by a step."""
    rng = random.Random(seed)
    replicas = rng.randrange(2, 5)
    everybody = {}
    ranks = [10 * replica for replica in range(replicas)]
    stoppings = [Stopping(Notices(rank, everybody), 1, ranks) for rank in ranks]
    in_step = threading.Barrier(replicas)
    naps = [[rng.random() * 1e-3 for _ in range(2000)] for _ in ranks]
    ended = {}
    stop_at = rng.randrange(20)
    asks = [rng.random() < 0.5 for _ in ranks]
    asks[rng.randrange(replicas)] = True

    def replica(number):
        stopping = stoppings[number]
        for step in range(2000):
            if asks[number] and step == stop_at:
                stopping.requested = True
            last = stopping.is_last(step)
            threading.Event().wait(naps[number][step])
            if together:
                in_step.wait(60)
            if last:
                ended[number] = step
                return

    threads = [threading.Thread(target=replica, args=(n,), daemon=True) for n in range(replicas)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for stopping in stoppings:
            stopping.arrange()
        threads[0].join(0.002)
    assert len(set(ended.values())) == 1, ended
    assert len(ended) == replicas
