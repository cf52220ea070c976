"""The switch in user space, on sockets that stand for the ranks' interfaces."""

import select
import socket
import time

import pytest

from ds_local.measure.relay import Relay

ALL, A, B, C = b"\xff" * 6, b"\x02aaaaa", b"\x02bbbbb", b"\x02ccccc"


class Port:
    """An interface: what a rank sends comes in at the relay, and the other way round."""

    def __init__(self):
        self.rank, self._relay = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.kind = 0

    def fileno(self):
        return self._relay.fileno()

    def recvfrom(self, size):
        return self._relay.recv(size), ("eth0", 3, self.kind, 1, b"")

    def send(self, frame):
        self._relay.send(frame)

    def close(self):
        self._relay.close()

    def got(self, seconds=5.0):
        """The next frame of the rank; None where none comes."""
        ready = select.select([self.rank], [], [], seconds)[0]
        return self.rank.recv(100) if ready else None


@pytest.fixture
def ports(monkeypatch):
    made = [Port() for _ in range(3)]
    monkeypatch.setattr(Relay, "_attach", lambda self: made)
    yield made
    for port in made:
        port.rank.close()


@pytest.fixture
def relay(ports):
    relay = Relay([])
    yield relay
    relay.close()


def test_what_is_for_all_goes_to_all_others(ports, relay):
    ports[0].rank.send(ALL + A + b"hello")
    assert ports[1].got() == ports[2].got() == ALL + A + b"hello"
    assert ports[0].got(0.0) is None


def test_a_port_is_known_once_it_has_sent(ports, relay):
    ports[1].rank.send(C + B + b"1")  # nobody knows where C is
    assert ports[0].got() == ports[2].got() == C + B + b"1"
    ports[0].rank.send(B + A + b"2")
    assert ports[1].got() == B + A + b"2"
    ports[0].rank.send(ALL + A + b"3")  # comes after: port 2 has not got the one before
    assert ports[2].got() == ALL + A + b"3"


def test_a_frame_is_held_back_by_the_delay(ports, relay):
    relay.delay_seconds = 0.1
    began = time.monotonic()
    for number in (b"1", b"2"):
        ports[0].rank.send(ALL + A + number)
    assert [ports[1].got()[-1:] for _ in range(2)] == [b"1", b"2"]
    assert time.monotonic() - began >= 0.1


def test_our_own_frames_are_not_sent_again(ports, relay):
    ports[0].kind = 4
    ports[0].rank.send(ALL + A + b"own")
    ports[2].rank.send(ALL + C + b"theirs")
    assert ports[1].got() == ALL + C + b"theirs"
