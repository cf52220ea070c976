"""What both ends of a lasting link share: places in its stream, and waiting for an end that is
away.

Lasting links outlive the processes at their ends: they are between parts of a pipeline that are
jobs of their own. The receiver listens and leaves its address in a file; the sender connects, and
connects again when it has lost the receiver. What was sent stays with the sender until the receiver
says that it will never need it again, so a receiver that was started anew can have it once more. A
message has a place in the stream, (step, kind, number), validation before training; both ends count
by places, so nothing comes twice and nothing is left out.

Threads do all of this. The main thread hands messages over and takes them, and waits with a limit.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_local.errors import TransportError
from ds_local.links.buffers import Tag
from ds_local.links.frames import send_frame
from ds_local.links.logs import LOG, say
from ds_local.links.staging import Staging
from ds_local.links.waiting import OUTSIDE, waiting

END = 2**62  # "nothing before this step is needed": nothing at all
LAST = 2**31  # a number after those of all messages of a step or validation
CONNECT_SECONDS = 10.0  # for the first word of the other end
_TICK_SECONDS = 0.5
_MOMENT = 2.0  # an absence that is over by then is not told
_GRACE_SECONDS = 1.0  # for a peer to come back before a step is given up for it
_START_SECONDS = 20.0  # the same for one that has not been there yet


class Place(NamedTuple):
    """Of a message in the stream of a link."""

    step: int
    trains: int  # 0: of the validation before the step
    number: int


class StepVoid(Exception):
    """A validation or a step that lacks messages: they will never come, or the unit below is away
    and other replicas may have theirs."""

    def __init__(self, place: Place, final: bool) -> None:
        super().__init__(f"no message for {place}")
        self.place, self.final = place, final


def place_of(tag: Tag) -> Place:
    """Messages of a validation have negative numbers."""
    if tag.micro_batch < 0:
        return Place(tag.step, 0, -1 - tag.micro_batch)
    return Place(tag.step, 1, tag.micro_batch)


def start_of(step: int) -> Place:
    """The first place of a step; every place before it belongs to an earlier one."""
    return Place(step, 0, -1)


@dataclass(frozen=True)
class Line:
    """What both ends of a lasting link are given.

    Args:
        name: what the link carries, for messages.
        folder: where the receiver leaves its address; both ends see it.
        peer: the other end, for messages.
        facts: of the run; both ends must have the same.
        depth: messages that the receiver has not taken before the sender waits.
        timeout_seconds: longest wait for a peer that is connected.
        reconnect_seconds: longest wait for one that is not.
        warn_seconds: a wait beyond this is told.
        lossy: other replicas do the same work, so that nobody waits for a peer that is away: what
            it misses is void.
    """

    name: str
    folder: Path
    peer: str
    facts: str
    depth: int
    timeout_seconds: float
    reconnect_seconds: float
    warn_seconds: float
    lossy: bool = False

    @property
    def card(self) -> Path:
        """The file with the receiver's address."""
        return self.folder / f"{self.name.replace(' ', '-')}.json"


class LineEnd:
    """What both ends share: the state that threads change, and waiting for a change of it."""

    def __init__(self, line: Line, device: torch.device) -> None:
        self.line = line
        self.name, self.waited, self.num_bytes = line.name, 0.0, 0
        self.ask_to_stop: Callable[[], None] = lambda: None  # called when the peer asks for it
        self._staging = Staging(device)
        self._changed = threading.Condition()
        self._connection: socket.socket | None = None  # once both ends know where the stream is
        self._away_since: float | None = time.perf_counter()  # None: the peer is there
        self._known = False  # it has been there
        self._missed = False  # its absence has been told
        self._refused = ""  # why this link can never work
        self._closed = False

    # --- waiting, in the main thread --------------------------------------------------------------

    def _until(self, done: Callable[[], bool], purpose: str) -> None:
        """Wait, with the condition held, until `done`.

        Raises:
            TransportError: naming the peer, after `reconnect_seconds` without it, or when it has
                been there for `timeout_seconds` more than that and it is still not done.
        """
        started = told = time.perf_counter()
        line = self.line
        try:
            with waiting(OUTSIDE, f"{line.peer} {purpose}"):
                while not done():
                    now, away = time.perf_counter(), self._away_since
                    if self._refused:
                        raise TransportError(self._refused)
                    if self._closed:
                        raise TransportError(f"the {self.name} is closed")
                    if away is not None and now - max(away, started) > line.reconnect_seconds:
                        raise TransportError(
                            f"waited for {line.peer} {purpose}, but it has been away for "
                            f"{now - away:.0f} s; start it again, or raise "
                            "local_parallel.link.reconnect_seconds"
                        )
                    if now - started > line.timeout_seconds + line.reconnect_seconds:
                        raise TransportError(
                            f"waited for {line.peer} {purpose}, but nothing came within "
                            f"{now - started:.0f} s"
                        )
                    if away is not None and now - max(away, started) > _MOMENT and not self._missed:
                        self._missed = True
                        say(f"{line.peer} is away; waiting for it, {line.reconnect_seconds:g} s")
                    if now - told > line.warn_seconds:
                        told = now
                        say(f"has waited {now - started:.0f} s for {line.peer} {purpose}")
                    self._changed.wait(_TICK_SECONDS)
        finally:
            self.waited += time.perf_counter() - started

    def _check_absence(self) -> None:
        """Raises TransportError when the peer has been away for too long."""
        away, limit = self._away_since, self.line.reconnect_seconds
        if away is not None and time.perf_counter() - away > limit:
            raise TransportError(
                f"{self.line.peer} has been away for {limit:.0f} s; start it again, or raise "
                "local_parallel.link.reconnect_seconds"
            )

    def _given_up(self) -> bool:
        """Is it better to go on without the peer?"""
        away = self._away_since
        grace = _GRACE_SECONDS if self._known else _START_SECONDS
        return self.line.lossy and away is not None and time.perf_counter() - away > grace

    # --- coming and going, in threads -------------------------------------------------------------

    def _came(self, connection: socket.socket) -> None:
        with self._changed:
            away, self._away_since, self._known = self._away_since, None, True
            former, self._connection = self._connection, connection
            self._changed.notify_all()
        if former is not None:  # an end that still believed in it comes anew
            self._lost(former, "replaced")
        seconds = 0.0 if away is None else time.perf_counter() - away
        LOG.info("%s: %s is there (after %.1f s)", self.name, self.line.peer, seconds)
        if self._missed:
            self._missed = False
            say(f"{self.line.peer} is back after {seconds:.0f} s")

    def _lost(self, connection: socket.socket, why: BaseException | str) -> None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        with self._changed:
            if self._connection is connection:
                self._connection = None
                self._away_since = time.perf_counter()
                if not self._closed:
                    LOG.info("%s: %s is gone: %s", self.name, self.line.peer, why)
                self._changed.notify_all()

    def _tell(self, **said: Any) -> None:
        """To the peer, if it is there; what it must know it is told again when it comes back. With
        the condition held, so that words do not mix."""
        if self._connection is not None:
            with suppress(OSError):  # the thread that reads finds out
                send_frame(self._connection, said)

    def close(self) -> None:
        """Leave the link. The peer sees that this end is gone."""
        with self._changed:
            self._closed = True
            connection = self._connection
            self._changed.notify_all()
        if connection is not None:
            self._lost(connection, "closed")

    def fail(self, reason: str) -> None:
        """Whatever ends this process ends nobody else: the peer waits for the next one."""
        self.close()

    def release(self) -> None:
        """Buffers are given back as they are needed no more."""

    def flush(self) -> None:
        """`drain` waits for the peer; a process that fails does not."""
