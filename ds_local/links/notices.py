"""Words between ranks off the step path: each rank answers the others from a thread of its own.

A rank asks another what it is doing, or tells it something, over a plain connection of one question
and one answer. That needs nobody's main thread and no store, so it works while main threads wait,
and no rank's death takes with it what the others know.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from enum import Enum
from itertools import count
from typing import Any, NamedTuple

from ds_local.links.logs import LOG
from ds_local.links.observer import Observer

_ANSWER_SECONDS = 6.0  # longest wait for an answer
_TELL_SECONDS = 3.0  # for a rank to take what it is told; one that does not answer is told in vain
_MOST_BYTES = 1 << 16
_MOST_AT_ONCE = 32  # ranks that are asked at the same time
_TRIES = 3  # of a connection that breaks while it is used


class Absence(Enum):
    """Why a rank gave no answer; of one rank, and of several."""

    GONE = "is gone: its process has ended", "are gone: their processes have ended"
    SILENT = "does not answer: stopped, or out of reach", "do not answer: stopped, or out of reach"


Answer = dict[str, Any] | Absence


class Card(NamedTuple):
    """Where a rank can be asked."""

    host: str
    address: str
    port: int
    secret: str  # rank 0's goes with every question


# a forked child must not keep the ports open when this process is gone
_LISTENERS: weakref.WeakSet[socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: any(map(socket.socket.close, _LISTENERS)))


class Notices:
    """This rank's end of it. Answers from the start, asks once `meet` has been called.

    Args:
        rank: of this process.
        address: at which the others can reach this machine.
    """

    def __init__(self, rank: int, address: str) -> None:
        self.rank = rank
        self.cards: list[Card] = []
        self.numbers = count(1)  # of the engines of this process, in the same order on all ranks
        self.observer = Observer()
        self._deaf: set[int] = set()  # ranks that were told something in vain
        self._handlers: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self.answer("state", self.observer.state)
        self._listener, address = _listen(address)
        port = self._listener.getsockname()[1]
        self.card = Card(socket.gethostname(), address, port, secrets.token_hex(16))
        threading.Thread(target=self._serve, daemon=True, name="notices").start()
        _LISTENERS.add(self._listener)

    @property
    def world_size(self) -> int:
        """Ranks that can be asked, this one included; none before all have met."""
        return len(self.cards)

    def meet(self, cards: Sequence[Sequence[Any]]) -> None:
        """Learn where everybody is; `cards` are those of all ranks, in order."""
        self.cards = [Card(*card) for card in cards]

    def close(self) -> None:
        """Answer no more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()

    # --- answering ------------------------------------------------------------------------------

    def answer(self, topic: str, handler: Callable[[dict[str, Any]], Any]) -> None:
        """Answer questions of this topic with what `handler` makes of them, a dict or None. It runs
        in the answering thread, so it must not wait for another rank."""
        self._handlers[topic] = handler

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with closing(connection):
                try:
                    self._reply(connection)
                except Exception as error:  # whatever it was that came, the next one is answered
                    LOG.debug("no answer to a question: %r", error)

    def _reply(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_SECONDS)
        question = json.loads(_read_line(connection))
        secret = self.cards[0].secret if self.cards else ""
        if not secret or not hmac.compare_digest(question.pop("secret"), secret):
            return
        handler = self._handlers.get(question.pop("topic"))
        reply = (handler and handler(question)) or {}
        connection.sendall(json.dumps({"rank": self.rank, **reply}).encode() + b"\n")

    # --- asking ---------------------------------------------------------------------------------

    def ask(self, rank: int, topic: str, seconds: float | None = None, **question: Any) -> Answer:
        """Another rank's answer, within so many seconds; by default a few."""
        card = self.cards[rank]
        if card.address.startswith("127.") and card.host != self.card.host:
            return Absence.SILENT  # it gave no address that means anything here
        question |= {"topic": topic, "secret": self.cards[0].secret}
        for _ in range(_TRIES):
            try:
                with socket.create_connection(card[1:3], seconds or _ANSWER_SECONDS) as connection:
                    connection.sendall(json.dumps(question).encode() + b"\n")
                    answer = json.loads(_read_line(connection))
            except ConnectionRefusedError:
                return Absence.GONE
            except (ConnectionError, ValueError):
                continue  # it ended in this moment, or another program has its port
            except OSError:
                return Absence.SILENT
            if answer.pop("rank", None) == rank:
                return answer
        return Absence.GONE

    def ask_all(self, topic: str, ranks: Iterable[int] | None = None, **question: Any) -> Any:
        """The answers of these ranks, by rank; by default all others."""
        asked = [r for r in (range(self.world_size) if ranks is None else ranks) if r != self.rank]
        if not asked:
            return {}
        with ThreadPoolExecutor(min(len(asked), _MOST_AT_ONCE)) as pool:
            answers = pool.map(lambda rank: self.ask(rank, topic, **question), asked)
            return dict(zip(asked, answers, strict=True))

    def tell_all(self, topic: str, **word: Any) -> None:
        """Tell all others; who does not take it soon is left out, and not waited for again."""
        ranks = [rank for rank in range(self.world_size) if rank not in self._deaf]
        answers = self.ask_all(topic, ranks, seconds=_TELL_SECONDS, **word)
        self._deaf |= {rank for rank, answer in answers.items() if answer is Absence.SILENT}


def _listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket at this address, or on this machine alone where it is no address of it."""
    for candidate in (address, "127.0.0.1"):
        listener = socket.socket()
        try:
            listener.bind((candidate, 0))
        except OSError:
            listener.close()
            continue
        listener.listen(1024)
        return listener, candidate
    raise OSError("no port can be opened on this machine, not even on the loopback interface")


def _read_line(connection: socket.socket) -> bytes:
    """What comes until the line ends; ConnectionError if it does not."""
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(4096)
        if not more or len(data) > _MOST_BYTES:
            raise ConnectionResetError("the line does not end")
        data += more
    return data


_current: list[Notices] = []  # of the process group that this process is in


def current() -> Notices | None:
    return _current[0] if _current else None


def begin(notices: Notices) -> Notices:
    """Make these the notices of this process; earlier ones are closed."""
    end()
    _current.append(notices)
    return notices


def end() -> None:
    """Close the notices of this process."""
    while _current:
        _current.pop().close()
