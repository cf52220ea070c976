"""The sending end of a lasting link: holds what the receiver may still need."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.buffers import Buffer, Form, Message, Tag, described, specs_of
from ds_local.links.frames import read_frame, send_frame
from ds_local.links.line import CONNECT_SECONDS, END, LAST, Line, LineEnd, Place, place_of
from ds_local.links.listener import connect, unreachable
from ds_local.links.staging import stand_on

_RETRY_SECONDS = 0.1  # between two tries to connect
_LOOK_SECONDS = 1.0  # between two looks at the receiver's address


@dataclass
class _Held:
    """A message that the receiver may still need."""

    place: Place
    said: dict[str, Any]
    buffer: Tensor | None = None  # None: everything up to the place is void
    copied: Any = None  # an event to wait for before the buffer is read, or None


class LastingSender(LineEnd):
    """The sending end of a lasting link."""

    def __init__(self, line: Line, device: torch.device) -> None:
        super().__init__(line, device)
        self.needed = 0  # the first step of which the receiver may still need something
        self.wanted: int | None = None  # the step that it wants to begin with, once it has said so
        self.message_bytes = 0  # of the newest message
        self.others_go_on = False  # other replicas have messages of the same steps for their peers
        self._first: int | None = None  # the first step that this end has
        self._held: deque[_Held] = deque()
        self._next = 0  # of those, the first that has not gone over this connection
        self._untaken: set[Place] = set()
        self._forms: dict[tuple[Any, ...], Form] = {}
        self._after: Place | None = None  # the peer has everything up to here
        self._identity = secrets.token_hex(8)  # tells this process from one that takes its place
        threading.Thread(target=self._feed, daemon=True, name=f"to {line.peer}").start()

    # --- the main thread --------------------------------------------------------------------------

    def wants(self, step: int) -> int | None:
        """The first step that the receiver wants. Waits for it to come; None: nobody waits for it.

        Args:
            step: that this end has done, by its checkpoint.

        Raises:
            TransportError: when it does not, or runs another configuration, or has ended before
                this end began.
        """
        with self._changed:
            self._until(
                lambda: self.wanted is not None or self._given_up(), "to say where it goes on"
            )
            if self.wanted == END and not step:
                raise TransportError(
                    f"{self.line.peer} has ended by {self.line.card}, but this part of the run is "
                    "at its beginning; remove the files of that run beside this one's, or give "
                    "another --output"
                )
            return self.wanted

    def begin_at(self, step: int) -> None:
        """This end has all messages from this step on, once they are computed."""
        with self._changed:
            self._first = step
            self._changed.notify_all()

    def send(self, tag: Tag, tensors: Message) -> None:
        """Hand the tensors over; they are copied. Waits while the receiver has not taken `depth`
        messages.

        Raises:
            TransportError: when the peer does not come back, or does not keep up.
        """
        place = place_of(tag)
        specs = specs_of(tensors, self._staging.device)
        form = self._forms.setdefault(tuple(specs), Form(specs, False))
        self.message_bytes = form.num_bytes
        with self._changed:
            self._until(
                lambda: (
                    self._has(place) or len(self._untaken) < self.line.depth or self._misses(place)
                ),
                f"to take a message ({tag} is next)",
            )
            if self._has(place):
                return
        buffer = Buffer(form.staged, self._staging.buffer(form.num_bytes))
        copied = self._staging.to_host(buffer.tensors, tensors)
        with self._changed:
            said = {"tag": tag, "layout": described(specs)}
            self._held.append(_Held(place, said, buffer.data, copied))
            self._untaken.add(place)
            self.num_bytes += form.num_bytes
            self._changed.notify_all()

    def send_void(self, step: int, trains: int) -> None:
        """Say that the rest of a step, or of the validation before it, will not come."""
        place = Place(step, trains, LAST)
        with self._changed:
            if not self._misses(place) and not self._has(place):
                self._held.append(_Held(place, {"void": place}))
                self._changed.notify_all()

    def _misses(self, place: Place) -> bool:
        """Nobody waits for a peer that is away: it begins with a later step."""
        if not self.others_go_on or not self._given_up() or self._first is None:
            return False
        while self._held and self._held[0].place.step < place.step:
            self._untaken.discard(self._held.popleft().place)
            self._next = max(0, self._next - 1)
            self._first = place.step
        return True

    def _has(self, place: Place) -> bool:
        """Has the receiver got it from a process that was here before?"""
        return self.needed > place.step or (self._after is not None and place <= self._after)

    def drain(self, hear: Callable[[int], None] = lambda _: None) -> None:
        """Wait until the receiver has ended well: until then it may be started again and need what
        is held here.

        Args:
            hear: is told of every step that it does, a sign of life.
        """
        with self._changed:
            while (known := self.needed) < END:
                self._until(lambda: self.needed > known, "to end its part of the run")
                hear(self.needed)
        self.close()

    # --- the thread that feeds --------------------------------------------------------------------

    def _feed(self) -> None:
        stand_on(self._staging.device)
        while not self._closed and not self._refused:
            text = self._card()
            connection = None if text is None else self._connect(text)
            if connection is None:
                # an address that has failed may work again: the way there was cut
                time.sleep(_RETRY_SECONDS)
                continue
            try:
                self._greet(connection, str(text))
                reader = threading.Thread(target=self._hear, args=(connection,), daemon=True)
                reader.start()
                self._serve(connection, str(text))
            except (OSError, KeyError, TypeError) as error:
                self._lost(connection, error)

    def _card(self) -> str | None:
        try:
            return self.line.card.read_text()
        except OSError:
            return None

    def _connect(self, text: str) -> socket.socket | None:
        try:
            card = json.loads(text)
            if card.get("ended") == self.line.facts:
                self._has_ended()
                return None
            if (why := unreachable(card)) is not None:
                with self._changed:
                    self._refused = f"{self.line.peer} cannot be reached: {why}"
                    self._changed.notify_all()
                return None
            line = self.line
            hello = {"link": line.name, "facts": line.facts, "sender": self._identity}
            return connect(card, line.reconnect_seconds, CONNECT_SECONDS, hello)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _has_ended(self) -> None:
        with self._changed:
            self.needed, self.wanted, self._away_since = END, END, None
            self._drop()
            self._changed.notify_all()

    def _greet(self, connection: socket.socket, text: str) -> None:
        """Find out what the receiver has and wants, and tell it where the stream begins."""
        connection.settimeout(_LOOK_SECONDS)
        said = self._patiently(connection, text)
        if "refused" in said:
            with self._changed:
                self._refused = str(said["refused"])
                self._changed.notify_all()
            raise ConnectionError(self._refused)
        with self._changed:
            self.wanted = int(said["wants"])
            self._changed.notify_all()
            while self._first is None and not self._closed:
                self._changed.wait(_LOOK_SECONDS)
                if self._card() != text:
                    raise ConnectionError("it has another address")
            first = max(self._first or 0, self.needed if self.needed < END else 0)
        send_frame(connection, {"first": first})
        said, _ = read_frame(connection)
        with self._changed:
            self.needed = max(self.needed, int(said["needed"]))
            self._drop()
            self._after = after = Place(*said["after"])
            waits = {Place(*place) for place in said["waiting"]}
            self._next = sum(held.place <= after for held in self._held)
            news = {h.place for h in self._held if h.place > after and h.buffer is not None}
            self._untaken = waits | news
        connection.settimeout(None)
        self._came(connection)

    def _patiently(self, connection: socket.socket, text: str) -> dict[str, Any]:
        """The receiver answers once it knows what it wants, which may take its own neighbours."""
        while not self._closed:
            try:
                first = connection.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                if self._card() != text:
                    raise ConnectionError("it has another address") from None
                continue
            if not first:
                break
            connection.settimeout(CONNECT_SECONDS)
            return read_frame(connection)[0]
        raise ConnectionError("the other end has closed")

    def _serve(self, connection: socket.socket, text: str) -> None:
        """Send what is held, as it comes, until the connection is lost."""
        looked = time.perf_counter()
        while True:
            with self._changed:
                while self._next >= len(self._held) and self._connection is connection:
                    self._changed.wait(_LOOK_SECONDS)
                    if time.perf_counter() - looked > _LOOK_SECONDS:
                        break
                if self._connection is not connection:
                    return
                held = self._held[self._next] if self._next < len(self._held) else None
                self._next += held is not None
            if time.perf_counter() - looked > _LOOK_SECONDS:
                looked = time.perf_counter()
                if self.needed < END and self._card() != text:
                    raise ConnectionError("it has another address")
            if held is not None:
                if held.copied is not None and held.buffer is not None:
                    held.copied.synchronize()
                    # pinned memory is for the copy alone: many messages may be held for long
                    held.buffer, held.copied = held.buffer.clone(), None
                send_frame(connection, held.said, held.buffer)

    def _hear(self, connection: socket.socket) -> None:
        """What the receiver says."""
        try:
            while True:
                said, _ = read_frame(connection)
                with self._changed:
                    if "taken" in said:
                        self._untaken.discard(Place(*said["taken"]))
                    if "needed" in said:
                        self.needed = max(self.needed, int(said["needed"]))
                        self._drop()
                    self._changed.notify_all()
                if "stop" in said:
                    self.ask_to_stop()
        except (OSError, TypeError) as error:
            self._lost(connection, error)

    def _drop(self) -> None:
        """Let go of what is needed no more."""
        while self._held and self._held[0].place.step < self.needed:
            self._untaken.discard(self._held.popleft().place)
            self._next = max(0, self._next - 1)
