"""The ranks that the tests of several processes and the benchmarks run on."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ds_local.measure import ranks
from ds_local.measure.ranks import Pool, RankError


@pytest.fixture
def pool():
    pool = Pool()
    yield pool
    pool.close()


def who_is_here():
    return dist.get_rank(), dist.get_world_size(), os.getpid()


def test_ranks_live_on_and_every_call_has_a_group_of_its_own(pool):
    first, second, third = (pool.run(who_is_here, ranks) for ranks in (3, 2, 3))
    assert [rank for rank, *_ in first] == [0, 1, 2]
    assert [(rank, size) for rank, size, _ in second] == [(0, 2), (1, 2)]
    assert third == first


def test_a_port_may_come_again_with_other_ranks(pool, monkeypatch):
    """Ports are drawn, and after thousands of calls one comes twice."""
    port = ranks.free_port()
    monkeypatch.setattr(ranks, "free_port", lambda: port)
    sizes = [[size for _, size, _ in pool.run(who_is_here, n, timeout=30)] for n in (2, 3, 2)]
    assert sizes == [[2] * 2, [3] * 3, [2] * 2]


def what_is_warm():
    return "ds_local.measure.warm" in sys.modules, torch.get_num_threads()


def test_ranks_are_forked_from_what_has_imported_everything():
    assert run_ranks(what_is_warm, 2) == [(True, 1)] * 2


def rank_1_fails(how):
    if dist.get_rank() == 1:
        how()


def of_a_layer():
    raise ValueError("of a layer")


def by_itself():
    os._exit(3)


def test_the_first_failure_is_reported_and_the_next_call_starts_fresh_ranks(pool):
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:\n.*in of_a_layer.*ValueError: of a l"):
        pool.run(rank_1_fails, 2, of_a_layer)
    with pytest.raises(RankError, match=r"^ranks \[.*1\] died$"):
        pool.run(rank_1_fails, 2, by_itself)
    assert [rank for rank, *_ in pool.run(who_is_here, 2)] == [0, 1]


def late():
    time.sleep(60)


def test_ranks_that_take_too_long_say_where_they_are(pool):
    began = time.monotonic()
    with pytest.raises(RankError) as raised:
        pool.run(rank_1_fails, 2, late, timeout=3)
    assert time.monotonic() - began < 50
    said = str(raised.value)
    assert said.startswith("ranks [1] did not finish within 3 s; where they are:\nrank 1:\n")
    newest_first = said[said.index("in late\n") :]
    assert newest_first.index("in rank_1_fails\n") < newest_first.index("in _run\n")
