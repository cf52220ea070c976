"""Ranks at the store of rank 0, as threads; meetings of processes are in test_start_check.py."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from ranks import free_port

from ds_local.cluster.assembly import Assembly, absent, spans
from ds_local.errors import ClusterError


def assemblies(world_size, port):
    def make(rank):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        return Assembly(10.0, environment | {"LOCAL_SIZE": str(world_size)})

    return make


def test_spans_of_ranks():
    assert spans([5, 0, 1, 2, 3]) == "0-3, 5"
    assert spans([]) == ""
    assert spans([4]) == "4"


def test_what_ranks_exchange_is_in_their_order():
    make = assemblies(3, free_port())

    def run(rank):
        return make(rank).exchange("words", {"rank": rank})

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert found == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def test_a_verdict_of_rank_0_is_that_of_all():
    make = assemblies(2, free_port())

    def run(rank):
        assembly = make(rank)
        assembly.judge("first", "")
        try:
            assembly.judge("second", "another code")
        except ClusterError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == ["another code"] * 2


def test_the_absent_are_named_beside_those_who_are_here():
    first = SimpleNamespace(rank=0, world_size=4, limit_seconds=7.0)
    found = {0: {"host": "a"}, 2: {"host": "b"}}
    assert absent(found, first) == (
        "ranks 1, 3 of 4 did not come within 7 s (here are a: 0; b: 2); start them, or look why "
        "they ended"
    )
    everybody = {rank: {"host": "a"} for rank in range(4)}
    assert absent(everybody, first) == ""
    assert absent(found, SimpleNamespace(rank=1, world_size=4, limit_seconds=7.0)) == ""
