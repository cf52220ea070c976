"""Networks of ranks: names, addresses, and where they are not allowed; they are made in tests of
two hosts."""

import pytest

from ds_local.measure import network
from ds_local.measure.network import Shape, address, interfaces, refusal, shape_this_rank


def test_every_rank_has_an_address_of_its_own():
    assert [address(rank) for rank in (0, 1, 9)] == ["10.77.0.1", "10.77.0.2", "10.77.0.10"]
    assert interfaces(True) != interfaces(False)


def test_without_the_command_there_are_no_namespaces(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal() == "the command unshare cannot be run (No such file or directory)"


@pytest.mark.parametrize(
    ("shape", "command"),
    [
        (Shape(bits_per_second=2.5e6), "tc qdisc replace dev eth0 root tbf rate 2500kbit"),
        (Shape(delay_seconds=1.0), "tc qdisc del dev eth0 root"),
    ],
)
def test_only_inside_a_namespace_is_anything_limited(shape, command, monkeypatch):
    said = []
    monkeypatch.setattr(network.subprocess, "run", lambda words, **_: said.append(words))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    shape_this_rank(shape)
    assert said == []
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    shape_this_rank(shape)
    assert [words.startswith(command) for words in said] == [True]
