"""Ranks answer each other from a thread of their own; who does not is gone or silent."""

import os
import socket
import threading

import pytest

from ds_local.links import notices
from ds_local.links.notices import Absence, Notices
from ds_local.links.waiting import EVERYBODY, waiting


@pytest.fixture
def ranks():
    """Three ranks, in one process."""
    made = [Notices(rank, "127.0.0.1") for rank in range(3)]
    for one in made:
        one.meet([other.card for other in made])
    yield made
    for one in made:
        one.close()


def test_a_question_reaches_its_topic(ranks):
    ranks[1].answer("double", lambda question: {"is": 2 * question["number"]})
    assert ranks[0].ask(1, "double", number=21) == {"is": 42}
    assert ranks[0].ask(2, "double", number=21) == {}  # nobody there who knows
    assert ranks[0].ask_all("double", number=1) == {1: {"is": 2}, 2: {}}
    assert ranks[0].ask_all("double", ranks=[0, 1], number=1) == {1: {"is": 2}}  # others only


def test_who_is_gone_and_who_is_silent(ranks, monkeypatch):
    monkeypatch.setattr(notices, "_ANSWER_SECONDS", 0.3)
    release = threading.Event()
    ranks[1].answer("state", lambda _: release.wait(60))
    ranks[2].close()
    assert ranks[0].ask_all("state") == {1: Absence.SILENT, 2: Absence.GONE}
    release.set()


def test_strangers_get_no_answer_and_do_no_harm(ranks):
    heard = []
    ranks[1].answer("stop", heard.append)
    address = ranks[1].card.address, ranks[1].card.port
    for words in (
        b"\n",
        b"GET / HTTP/1.1\r\n",
        b"[]\n",
        b'{"topic": "stop", "secret": "x"}\n',
        b"",
    ):
        with socket.create_connection(address, 10) as connection:
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(10) == b""
    assert not heard
    assert ranks[0].ask(1, "stop") == {}
    assert len(heard) == 1


def test_another_program_at_the_port_is_not_the_rank(ranks):
    ranks[1].close()
    impostor = Notices(7, "127.0.0.1")
    impostor.meet([one.card for one in ranks])
    cards = [one.card for one in ranks]
    cards[1] = impostor.card
    ranks[0].meet(cards)
    assert ranks[0].ask(1, "state") is Absence.GONE
    impostor.close()


def test_a_forked_child_does_not_keep_the_port(ranks):
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reads, 1)
        os._exit(0)
    try:
        ranks[1].close()
        assert ranks[0].ask(1, "state") is Absence.GONE
    finally:
        os.write(writes, b"x")
        os.waitpid(child, 0)


def test_the_state_says_what_the_main_thread_does_and_waits_for(ranks):
    state = ranks[0].ask(1, "state")
    assert state["waiting"] is None
    with ranks[1].observer.during("the save after step 3"):
        assert ranks[0].ask(1, "state")["doing"] == "the save after step 3"
        with waiting(2, "to send step 4"):
            rank, purpose, seconds = ranks[0].ask(1, "state")["waiting"]
    assert (rank, purpose) == (2, "to send step 4")
    assert seconds >= 0
    with waiting(EVERYBODY, "in a meeting"):
        assert ranks[0].ask(1, "state")["waiting"][:2] == [EVERYBODY, "in a meeting"]
    assert ranks[0].ask(1, "state")["waiting"] is None


def test_an_address_of_another_machine_falls_back_to_the_loopback():
    one = Notices(0, "192.0.2.1")  # for documentation, nobody's
    assert one.card.address == "127.0.0.1"
    one.close()
