"""The checks before the processes meet."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from launch import ROOT
from ranks import free_port

from ds_local.cluster import start_check as cluster
from ds_local.cluster.start_check import fingerprint
from ds_local.errors import ClusterError

sys.path.insert(0, str(ROOT / "scripts"))
from misconfigurations import CASES, make


def ranks(world_size=2, here=None, change=None, limit=20.0, port=None):
    """What each of the ranks `here` of a world hears: the ranks it knows of, or an error. Ranks are
    threads."""
    facts = {**cluster.own_facts({"a": 1}), "world_size": world_size}
    port = port or free_port()

    def run(rank):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            return sorted(
                cluster.check_start(
                    facts | (change or {}).get(str(rank), {}), (), limit, environment
                )
            )
        except ClusterError as error:
            return str(error)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size) if here is None else here))


def test_equal_ranks_pass():
    assert ranks() == [[0, 1], []]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"torch": "2.12.0"}}, "in its versions: torch 2.12.0 instead of torch"),
        ({"code": "abc"}, "in its code: abc instead of"),
        ({"config": "abc"}, "give every node the same config files"),
        ({"data": "abc"}, "copy one prepared data folder"),
        ({"world_size": 4}, "in its world size: 4 instead of 2"),
        (
            {"address": "127.0.1.1", "host": "other"},
            "resolves to the loopback address 127.0.1.1; set GLOO_SOCKET_IFNAME",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_rank_that_differs_is_named_to_all(change, said):
    for text in ranks(change={"1": change}):
        assert said in text
        assert "rank 1 on" in text


DAMAGES = {
    "folder": (None, "No such file or directory"),
    "file": ("", "No such file or directory"),
    "text": ('{"seq_len": 1', "prepared.json: "),
    "letters": (b"\xff", "prepared.json: "),
    "key": ("{}", "prepared.json: 'seq_len'"),
    "kind": ("[]", "prepared.json: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_rank_without_the_data_is_named_to_all(tmp_path, damage):
    """Not "did not come" when the limit is over."""
    content, why = DAMAGES[damage]
    data = tmp_path / "data"
    if content is not None:
        data.mkdir()
    if content:
        path = data / "prepared.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    facts = cluster.own_facts(None, data)
    for text in ranks(change={"1": {key: facts[key] for key in ("data", "refused")}}, limit=60):
        assert f"rank 1 on {os.uname().nodename}: {data} is no prepared data folder ({why}" in text
        assert "copy one prepared data folder to every node" in text
    for text in ranks(change={rank: {"refused": facts["refused"]} for rank in "01"}, limit=60):
        assert f"rank 0 on {os.uname().nodename}: {data} is no" in text


def test_facts_of_a_data_folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "prepared.json").write_text('{"seq_len": 128}')
    found, seq_len = cluster.data_facts(tmp_path)
    assert seq_len == 128
    assert cluster.own_facts(None, tmp_path)["data"] == found
    (tmp_path / "train" / "data.arrow").write_bytes(b"1")
    assert cluster.data_facts(tmp_path)[0] != found


def test_a_missing_rank_is_named_within_the_limit():
    (text,) = ranks(3, here=[0], limit=3)
    assert "ranks 1-2 of 3 did not come within 3 s" in text
    assert f"here are {os.uname().nodename}: 0" in text


def test_a_missing_first_rank_is_named_within_the_limit():
    (text,) = ranks(2, here=[1], limit=3)
    assert "rank 1 on" in text
    assert "cannot reach rank 0 at 127.0.0.1" in text


def test_a_port_in_use_is_named():
    import socket

    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        (text,) = ranks(2, here=[0], port=s.getsockname()[1], limit=3)
    assert "is in use, perhaps by another job" in text
    assert "--master_port" in text


@pytest.mark.parametrize("name", CASES)
def test_every_documented_mistake_is_said(name):
    assert CASES[name][1] in make(name)[0]


def test_fingerprints():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})
