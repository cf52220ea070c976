"""Links that outlive the processes at their ends: between parts of a pipeline that are jobs of
their own.

The receiver listens and leaves its address in a file; the sender connects, and connects again when
it has lost the receiver. What was sent stays with the sender until the receiver says that it will
never need it again, so a receiver that was started anew can have it once more. A message has a
place in the stream, (step, kind, number), validation before training; both ends count by places, so
nothing comes twice and nothing is left out.

Threads do all of this. The main thread hands messages over and takes them, and waits with a limit.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.buffers import Buffer, Form, Message, Tag, described, specs_of
from ds_local.links.frames import address_card, mind, read_frame, send_frame, unreachable
from ds_local.links.line import END, LAST, Line, LineEnd, Place, StepVoid, place_of, start_of
from ds_local.outputs import write_whole

_TICK_SECONDS = 0.1  # between two tries to connect
_LOOK_SECONDS = 1.0  # between two looks at the receiver's address
_CONNECT_SECONDS = 10.0


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
        while not self._closed and not self._refused:
            text = self._card()
            connection = None if text is None else self._connect(text)
            if connection is None:
                # an address that has failed may work again: the way there was cut
                time.sleep(_TICK_SECONDS)
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
            address = (str(card["host"]), int(card["port"]))
            connection = socket.create_connection(address, _CONNECT_SECONDS)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        mind(connection, self.line.reconnect_seconds)
        return connection

    def _has_ended(self) -> None:
        with self._changed:
            self.needed, self.wanted, self._away_since = END, END, None
            self._drop()
            self._changed.notify_all()

    def _greet(self, connection: socket.socket, text: str) -> None:
        """Find out what the receiver has and wants, and tell it where the stream begins."""
        line = self.line
        connection.settimeout(_LOOK_SECONDS)
        hello = {"secret": json.loads(text)["secret"], "link": line.name, "facts": line.facts}
        send_frame(connection, hello | {"sender": self._identity})
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
            connection.settimeout(_CONNECT_SECONDS)
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
                if held.copied is not None:
                    held.copied.synchronize()
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


class LastingReceiver(LineEnd):
    """The receiving end of a lasting link."""

    steps_ahead = 0

    def __init__(self, line: Line, device: torch.device, host: str) -> None:
        super().__init__(line, device)
        self._needed = 0
        self._wants: int | None = None
        self._begins: int | None = None
        self._after: Place | None = None  # everything up to here has come
        self._come: dict[Place, tuple[Tag, Form, Tensor]] = {}  # and has not been taken
        self._void: Place | None = None  # nothing up to here will come that has not
        self._stop_asked = False
        self._sender = ""  # the newest to have come
        self._former: set[str] = set()  # whose place another has taken
        self._forms: dict[str, Form] = {}
        self._secret = secrets.token_hex(16)
        self._listener = socket.create_server((host, 0))
        card = address_card(host, self._listener, self._secret)
        line.folder.mkdir(parents=True, exist_ok=True)
        write_whole(line.card, json.dumps(card, indent=1) + "\n", secret=True)
        threading.Thread(target=self._accept, daemon=True, name=f"from {line.peer}").start()

    # --- the main thread --------------------------------------------------------------------------

    def begin_at(self, step: int) -> int:
        """Say which step this end wants to begin with; returns the first it can have, a later one
        where earlier messages are gone.

        Raises:
            TransportError: when the sender does not come, or runs another configuration.
        """
        with self._changed:
            self._wants = step
            self._changed.notify_all()
            self._until(
                lambda: self._begins is not None or self._given_up(),
                "to say where its messages begin",
            )
            if self._begins is None:  # nobody waits for it
                self._begins, self._after = step, start_of(step)
            return self._begins

    def receive(self, tag: Tag) -> tuple[Tag, Message]:
        """The message for `tag`; its tensors belong to the caller.

        Raises:
            TransportError: when the peer does not come back, or sends something else.
            StepVoid: when it will not come, and nobody waits for it.
        """
        place = place_of(tag)
        with self._changed:
            self._until(
                lambda: (
                    place in self._come
                    or self._is_void(place)
                    or self._given_up()
                    or len(self._come) >= self.line.depth
                ),  # it waits for us to take something else
                f"to send {tag}",
            )
            final = self._is_void(place)
            if place not in self._come and (final or self._given_up()):
                self._check_absence()
                if not final:  # whoever comes back is to send all of it
                    self._after = Place(place.step, place.trains, -1)
                raise StepVoid(place, final)
            if place not in self._come:
                others = ", ".join(str(found) for found, *_ in self._come.values())
                raise TransportError(
                    f"the {self.name} from {self.line.peer} brought {others}, expected {tag}; do "
                    "all parts run the same configuration?"
                )
            found, form, data = self._come.pop(place)
            self._tell(taken=place)
        self.num_bytes += form.num_bytes
        buffer = Buffer(form.staged, data)
        on_host = {s.name: buffer.tensors[s.name] for s in form.specs if s.on_host}
        moved = {s.name: buffer.tensors[s.name] for s in form.specs if not s.on_host}
        message = {**on_host, **self._staging.to_device(moved)}
        # `data`: each with a version of its own, or changing one in place would count for all
        return found, {s.name: message[s.name].data for s in form.specs}

    def leave_out(self, step: int, trains: int) -> None:
        """A step, or the validation before it, is done without its messages."""
        with self._changed:
            end = Place(step, trains, LAST)
            self._give_up(end)
            for place in [one for one in self._come if one <= end]:  # it has just come back
                del self._come[place]
                self._tell(taken=place)

    def _is_void(self, place: Place) -> bool:
        return self._void is not None and place <= self._void

    def _give_up(self, place: Place) -> None:
        """Everything up to here is void but for what has come."""
        self._void = max(place, self._void or place)
        self._after = max(place, self._after or place)
        self._changed.notify_all()

    def done_before(self, step: int) -> None:
        """Nothing before this step will ever be needed again, here or above."""
        with self._changed:
            if step > self._needed:
                self._needed = step
                self._tell(needed=step)

    def end(self, finished: bool) -> None:
        """This part has ended well, with all steps of the run or because it was asked to stop."""
        self.done_before(END)
        if finished:  # a sender that was away hears it from the file
            card = {"ended": self.line.facts}
            write_whole(self.line.card, json.dumps(card) + "\n")
        self.close()

    def stop(self) -> None:
        """Ask the parts below to let the run end."""
        with self._changed:
            self._stop_asked = True
            self._tell(stop=True)

    # --- threads ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or no descriptor is left for a moment
                time.sleep(_TICK_SECONDS)
                continue
            mind(connection, self.line.reconnect_seconds)
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        try:
            if self._answer(connection):
                while True:
                    self._take_in(*read_frame(connection, self._staging.buffer))
        except (OSError, KeyError, TypeError, ValueError) as error:
            self._lost(connection, error)

    def _answer(self, connection: socket.socket) -> bool:
        """Agree with the sender on where the stream goes on."""
        connection.settimeout(_CONNECT_SECONDS)
        hello, _ = read_frame(connection)
        if not hmac.compare_digest(str(hello["secret"]), self._secret):
            connection.close()
            return False
        if hello["link"] != self.name or hello["facts"] != self.line.facts:
            self._refused = (
                f"{self.line.peer} and this part of the pipeline were not started with the same "
                "model, data and configuration; start both with the same"
            )
            send_frame(connection, {"refused": self._refused})
            with self._changed:
                self._changed.notify_all()
            connection.close()
            return False
        sender = str(hello["sender"])
        if not self._is_newest(sender):
            refused = f"another process has taken the place of {self.line.peer}; end this one"
            send_frame(connection, {"refused": refused})
            connection.close()
            return False
        with self._changed:
            while self._wants is None and not self._closed:
                self._changed.wait()
            former = self._connection
        if former is not None:
            self._lost(former, "it came anew")
        send_frame(connection, {"wants": self._wanted_step})
        connection.settimeout(None)  # it may have to agree with its own neighbours first
        first = int(read_frame(connection)[0]["first"])
        with self._changed:  # from here to its end both ends know the same
            if not self._is_newest(sender):
                raise ConnectionError("another process has taken its place")
            self._meet(first)
            self._came(connection)
            said = {"after": self._after, "waiting": list(self._come), "needed": self._needed}
            send_frame(connection, said)
            if self._stop_asked:
                self._tell(stop=True)
        return True

    def _is_newest(self, sender: str) -> bool:
        """One that was believed dead and lives finds another in its place, and may not come back:
        the two would drive each other out without end."""
        with self._changed:
            if self._sender not in ("", sender) and sender not in self._former:
                self._former.add(self._sender)
            if sender not in self._former:
                self._sender = sender
            return sender == self._sender

    def _meet(self, first: int) -> None:
        """The sender has all messages from this step on."""
        begins = max(self._wanted_step, first)
        if self._after is None:
            self._begins, self._after = begins, start_of(begins)
            if self.line.lossy:
                self._give_up(self._after)
        elif begins > self._wanted_step and self.line.lossy:
            self._give_up(start_of(begins))
        elif begins > self._wanted_step:
            self._refused = (
                f"{self.line.peer} came back at step {begins}, but step {self._after.step} is "
                "not whole here; this part begins again"
            )

    @property
    def _wanted_step(self) -> int:
        """The first step of which something is still to come."""
        known = self._wants or 0
        return max(known if self._after is None else self._after.step, self._needed)

    def _take_in(self, said: dict[str, Any], data: Tensor | None) -> None:
        if "void" in said:
            with self._changed:
                self._give_up(Place(*said["void"]))
            return
        tag = Tag(*said["tag"])
        key = json.dumps(said["layout"])
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = Form.parse(said["layout"], False)
        place = place_of(tag)
        if data is None:
            raise ConnectionError("a message without bytes")
        with self._changed:
            if self._after is not None and place > self._after:
                self._come[place] = tag, form, data
                self._after = place
                self._changed.notify_all()
            elif place not in self._come:  # left out, or taken from a former connection
                self._tell(taken=place)

    def close(self) -> None:
        super().close()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()
