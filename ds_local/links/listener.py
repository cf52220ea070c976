"""A listener whose address and secret others find in a file, and the way to it."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_local.links.frames import read_frame, send_frame
from ds_local.outputs import write_whole

_PAUSE_SECONDS = 0.1  # before the next try, where nobody can be let in for a moment
_MOST_IDLE = 4 * 32767  # s: a quarter of it is the longest that the kernel waits before it looks


class Listener:
    """Answers processes that have read its card, each in a thread of its own.

    Args:
        host: address of this machine.
        card: the file with the address and the secret, written here; only its owner can read it.
        patience: seconds after which a machine that is gone counts as gone.
        hello_seconds: longest wait for the first frame of one that comes.
        welcome: called with a connection and its first frame, where that has the secret.
        lost: called with a connection and the error that ended it.
        also: what else the card says.
    """

    def __init__(
        self,
        host: str,
        card: Path,
        patience: float,
        hello_seconds: float,
        welcome: Callable[[socket.socket, dict[str, Any]], None],
        lost: Callable[[socket.socket, BaseException], None],
        also: Mapping[str, Any] | None = None,
    ) -> None:
        self._patience, self._hello_seconds = patience, hello_seconds
        self._welcome, self._lost = welcome, lost
        self._secret = secrets.token_hex(16)
        self._closed = False
        self._socket = socket.create_server((host, 0))
        address = {
            "host": host,
            "port": self._socket.getsockname()[1],
            "secret": self._secret,
            "process": os.getpid(),
            "machine": socket.gethostname(),
            **(also or {}),
        }
        card.parent.mkdir(parents=True, exist_ok=True)
        write_whole(card, json.dumps(address, indent=1) + "\n", secret=True)
        threading.Thread(target=self._accept, daemon=True, name=f"listens, {card.stem}").start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or no descriptor is left for a moment
                time.sleep(_PAUSE_SECONDS)
                continue
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            _watch(connection, self._patience)
            connection.settimeout(self._hello_seconds)
            hello, _ = read_frame(connection)
            if hmac.compare_digest(str(hello["secret"]), self._secret):
                self._welcome(connection, hello)
            else:
                connection.close()
        except (OSError, KeyError, TypeError, ValueError) as error:
            self._lost(connection, error)

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()


def connect(
    card: Mapping[str, Any], patience: float, hello_seconds: float, hello: Mapping[str, Any]
) -> socket.socket:
    """A connection to the listener of a card, whose first frame has been sent. The arguments are
    those of `Listener`.

    Raises:
        OSError: when nobody is there.
        KeyError: when the card is none.
    """
    address = (str(card["host"]), int(card["port"]))
    connection = socket.create_connection(address, hello_seconds)
    try:
        _watch(connection, patience)
        send_frame(connection, {**hello, "secret": card["secret"]})
    except BaseException:
        connection.close()
        raise
    return connection


def unreachable(card: Mapping[str, Any]) -> str | None:
    """Why no machine but its own can reach a listener, in a sentence; None: others can, or it is
    on this one."""
    host, machine = str(card["host"]), card.get("machine")
    if not host.startswith("127.") or machine in (None, socket.gethostname()):
        return None
    return (
        f"the name of {machine} resolves to its loopback address {host}; set GLOO_SOCKET_IFNAME on "
        "every node to the network card that the nodes share"
    )


def _watch(connection: socket.socket, seconds: float) -> None:
    """No delay for small words; a peer whose machine is gone is found out within so many seconds,
    and a cable that is back sooner has lost nothing."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limit = max(1, min(int(seconds), _MOST_IDLE))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, limit // 4))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, limit // 8))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * limit)
