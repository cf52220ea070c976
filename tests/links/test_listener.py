import json
import queue
import socket
from contextlib import closing, suppress

import pytest

from ds_local.links.frames import read_frame, send_frame
from ds_local.links.listener import Listener, connect

LONG = 30.0


class Host:
    """A listener, and what comes to it."""

    def __init__(self, folder, patience=LONG):
        self.came, self.failed = queue.Queue(), queue.Queue()
        file = folder / "cards" / "one.json"
        self.listener = Listener(
            "127.0.0.1",
            file,
            patience,
            LONG,
            lambda *one: self.came.put(one),
            lambda connection, error: (connection.close(), self.failed.put(error)),
        )
        assert file.stat().st_mode & 0o77 == 0
        self.card = json.loads(file.read_text())

    def close(self):
        self.listener.close()


@pytest.fixture
def host(tmp_path):
    with closing(Host(tmp_path)) as made:
        yield made


# the longest that the kernel takes are a day and a half; a link may be told to wait for longer
@pytest.mark.parametrize("patience", [0.1, 600, 172_800, 1e7])
def test_one_that_has_read_the_card_is_welcome(tmp_path, patience):
    with (
        closing(Host(tmp_path, patience)) as host,
        connect(host.card, patience, LONG, {"of": 1}) as mine,
    ):
        theirs, hello = host.came.get(timeout=LONG)
        assert hello == {"of": 1, "secret": host.card["secret"]}
        send_frame(mine, {"word": 2})
        with theirs:
            assert read_frame(theirs)[0] == {"word": 2}


def test_one_without_the_secret_hears_nothing(host):
    with connect(host.card | {"secret": "guessed"}, LONG, LONG, {}) as stranger:
        with pytest.raises(ConnectionError):
            read_frame(stranger)
        assert host.came.empty()


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n" * 9, b"", b"\x02\0\0\0" + bytes(8) + b"{}"]
)
def test_what_is_no_greeting_is_lost(host, said):
    with socket.create_connection((host.card["host"], host.card["port"])) as stranger:
        stranger.sendall(said)
        with suppress(OSError):  # it may have hung up already
            stranger.shutdown(socket.SHUT_WR)
        assert isinstance(host.failed.get(timeout=LONG), OSError | KeyError)
    with connect(host.card, LONG, LONG, {}):
        host.came.get(timeout=LONG)[0].close()


def test_nobody_is_let_in_once_it_is_closed(host):
    host.close()
    with pytest.raises(OSError, match="refused"):
        connect(host.card, LONG, LONG, {})
