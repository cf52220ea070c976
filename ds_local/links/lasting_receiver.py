"""The receiving end of a lasting link: listens, and says what it needs."""

from __future__ import annotations

import json
import socket
from typing import Any

import torch
from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.buffers import Buffer, Form, Message, Tag
from ds_local.links.frames import read_frame, send_frame
from ds_local.links.line import (
    CONNECT_SECONDS,
    END,
    LAST,
    Line,
    LineEnd,
    Place,
    StepVoid,
    place_of,
    start_of,
)
from ds_local.links.listener import Listener
from ds_local.links.staging import stand_on
from ds_local.outputs import write_whole


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
        self.had_ended = self._had_ended()
        self._listener = Listener(
            host,
            line.card,
            line.reconnect_seconds,
            CONNECT_SECONDS,
            self._welcome,
            self._lost,
            also={"had_ended": line.facts} if self.had_ended else {},  # for whoever comes next
        )

    def _had_ended(self) -> bool:
        """Did a process that was here before leave word that this part of the run has ended?"""
        try:
            card = json.loads(self.line.card.read_text())
            return self.line.facts in (card.get("ended"), card.get("had_ended"))
        except (OSError, ValueError, AttributeError):
            return False

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

    def _welcome(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        stand_on(self._staging.device)  # for pinned memory torch asks events of the device
        if self._agree(connection, hello):
            while True:
                self._take_in(*read_frame(connection, self._staging.buffer))

    def _agree(self, connection: socket.socket, hello: dict[str, Any]) -> bool:
        """With the sender, on where the stream goes on. False: it is refused."""
        if hello["link"] != self.name or hello["facts"] != self.line.facts:
            refused = self._refused = (
                f"{self.line.peer} and this part of the pipeline were not started with the same "
                "model, data and configuration; start both with the same"
            )
        elif not self._takes_over(sender := str(hello["sender"])):
            refused = f"another process has taken the place of {self.line.peer}; end this one"
        else:
            refused = ""
        if refused:
            send_frame(connection, {"refused": refused})
            with self._changed:
                self._changed.notify_all()
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
            if sender != self._sender:
                raise ConnectionError("another process has taken its place")
            self._meet(first)
            self._came(connection)
            said = {"after": self._after, "waiting": list(self._come), "needed": self._needed}
            send_frame(connection, said)
            if self._stop_asked:
                self._tell(stop=True)
        return True

    def _takes_over(self, sender: str) -> bool:
        """Whether it is the newest now. One that was believed dead and lives finds another in its
        place, and may not come back: the two would drive each other out without end."""
        with self._changed:
            if sender in self._former:
                return False
            if self._sender != sender:
                self._former.add(self._sender)
                self._sender = sender
            return True

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
        self._listener.close()
