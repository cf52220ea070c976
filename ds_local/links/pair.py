"""The two ends of a link between two stages, over the group of their two ranks.

The receiver keeps `depth` receives posted ahead, so a message lands while its stage computes; the
sender keeps each buffer alive until it is gone and waits once `depth` messages are under way. Gloo
moves bytes only after the receive is posted, which is why the ring of receives matters.

A message goes through host memory over gloo, all of it or (`Direct`) all but what goes from device
to device over NCCL. Shapes may change from message to message: the first of its form is announced,
and gloo lets a message be shorter than the buffer that waits for it. One that is longer moves the
link to a ring of larger buffers, with a tag of its own; what waits in the old one is sent nothing.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.buffers import (
    SPEC_BYTES,
    Buffer,
    Form,
    Message,
    Packed,
    Tag,
    described,
    header_of,
    said_in,
    specs_of,
    text_buffer,
)
from ds_local.links.ends import FAILED, FORM, LEAST_ROOM, MESSAGE, GroupEnd
from ds_local.links.staging import Departures, Direct

_FAREWELL_SECONDS = 3.0  # spent on telling the neighbours about a failure
_GROWTH = 1.5  # of the buffers, at least, so that lengths that creep up move the ring seldom


class _Sent(NamedTuple):
    """Sends in their order, and the bytes that they read."""

    works: list[Any]
    packets: list[tuple[Tensor, int]]

    def wait(self, limit: timedelta) -> None:
        for work in self.works:
            work.wait(limit)


class Sender(GroupEnd):
    """The sending end of a link between two stages."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._free: list[Buffer] = []  # each of `_room` bytes
        self._forms: dict[tuple[Any, ...], Form] = {}  # by their specs
        self._departures = Departures(self._staging.device)

    def send(self, tag: Tag, tensors: Message) -> None:
        """Hand the tensors over; they are copied. The caller may drop them at once; on a device the
        copy may still run, so nothing may be written into them in place.

        Raises:
            TransportError: when the peer is gone or does not keep up.
        """
        specs, form = specs_of(tensors, self._staging.device), self._form
        packets: list[tuple[Tensor, int]] = []
        if form is None or specs != form.specs:
            form, packets = self._change_form(specs)
        buffer = self._buffer(form)
        copied = self._staging.to_host(buffer.tensors, tensors)
        flags = tag.run_ends + 2 * tag.data_ends + 4 * form.number
        buffer.header[:] = MESSAGE, tag.step, tag.micro_batch, flags
        while len(self._under_way) >= self.depth:
            self._take_back(f"to take a message ({tag} is next)")
        try:
            start = partial(self._start, [*packets, (buffer.data, self._tag)])
            works = [start() if copied is None else self._departures.after(copied, start)]
            if self._direct is not None:
                works.append(self._direct.send(form.direct, tensors))
        except RuntimeError as error:
            raise self._unreachable(error) from error
        self._under_way.append((works, buffer))
        self.num_bytes += form.num_bytes

    def _change_form(self, specs: list[Any]) -> tuple[Form, list[tuple[Tensor, int]]]:
        """The form of these tensors, and with which tags to send what before them."""
        key = tuple(specs)
        packets: list[tuple[Tensor, int]] = []
        if key not in self._forms:
            form = Form(specs, self._direct is not None, len(self._forms))
            said: dict[str, Any] = {"layout": described(specs)}
            needed, tag, is_first = form.staged.num_bytes, self._tag, self._form is None
            if is_first or needed > self._room:
                self._room = max(needed, LEAST_ROOM if is_first else int(self._room * _GROWTH))
                self._free.clear()
                self._tag += 1
                said["room"] = self._room
            packets = [(text_buffer(FORM, said), tag)]
            if "room" in said and not is_first:
                packets += [(packets[0][0][:0], tag)] * (self.depth - 1)
            self._forms[key] = form
        self._form = self._forms[key]
        return self._form, packets

    def _buffer(self, form: Form) -> Buffer:
        if not self._free:
            return Buffer(form.staged, self._staging.buffer(self._room))
        buffer = self._free.pop()
        return buffer if buffer.packed is form.staged else Buffer(form.staged, buffer.whole)

    def _take_back(self, purpose: str) -> None:
        """Wait for the oldest message; its buffer may serve again."""
        works, buffer = self._under_way.popleft()
        for work in works:
            self._wait(work, purpose)
        if buffer is not None and len(buffer.whole) == self._room:
            self._free.append(buffer)

    def _start(self, packets: list[tuple[Tensor, int]]) -> _Sent:
        works: list[Any] = []
        for data, tag in packets:
            works.append(self._group.send(data, self.peer.rank, tag))
        return _Sent(works, packets)

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        while self._under_way:
            self._take_back("to take the last messages")

    def release(self) -> None:
        """Let go of buffers that nothing is in."""
        self._free.clear()

    def fail(self, reason: str) -> None:
        """Tell the receiver why nothing more will come. Best effort: never raises, waits a few
        seconds at most."""
        self.timeout_seconds = min(self.timeout_seconds, _FAREWELL_SECONDS)
        packet = text_buffer(FAILED, {"reason": reason[: SPEC_BYTES // 8]})
        try:
            self._under_way.append(([self._start([(packet, self._tag)])], None))
            self.flush()
        except RuntimeError:
            self._under_way.clear()  # the peer is gone as well: nobody waits for it once more


class Receiver(GroupEnd):
    """The receiving end of a link between two stages."""

    steps_ahead = 0  # that messages may be of, beyond the step that is asked for

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._forms: list[Form] = []
        self._early: dict[
            tuple[int, int], tuple[Tag, Message]
        ] = {}  # came before they were asked for

    def receive(self, tag: Tag) -> tuple[Tag, Message]:
        """The message for `tag`; its tensors belong to the caller. Other messages of the step, or
        of the `steps_ahead` after it, may come first, they are kept.

        Raises:
            TransportError: when a message of another step comes, or the peer failed, is gone or
                silent.
        """
        while tag[:2] not in self._early:
            found, message = self._next(tag)
            self._early[found[:2]] = found, message
        return self._early.pop(tag[:2])

    def _next(self, tag: Tag) -> tuple[Tag, Message]:
        data, (code, step, micro_batch, flags) = self._next_message(tag)
        found = Tag(step, micro_batch, bool(flags & 1), bool(flags & 2))
        if code != MESSAGE or not tag.step <= step <= tag.step + self.steps_ahead:
            raise TransportError(
                f"the {self.name} from {self.peer} brought {found}, expected {tag}; do all ranks "
                "run the same configuration?"
            )
        form = self._form = self._forms[flags >> 2]
        buffer = Buffer(form.staged, data)
        self.num_bytes += form.num_bytes
        moved = self._staging.to_device(
            {s.name: buffer.tensors[s.name] for s in form.staged.specs if not s.on_host}
        )
        direct = (
            {} if self._direct is None else self._past_the_host(self._direct, form.direct, found)
        )
        message = {**buffer.tensors, **moved, **direct}
        # `data`: each with a version of its own, or changing one in place would count for all
        return found, {name: tensor.data for name, tensor in message.items()}

    def _next_message(self, tag: Tag) -> tuple[Tensor, list[int]]:
        """The bytes and the header of the next message with tensors."""
        if not self._forms and not self._under_way:
            self._post()
        while True:
            work, data = self._under_way.popleft()
            first = "" if self._forms else "its first message, "
            self._wait(work, f"to send {first}{tag}")
            header = header_of(data).tolist()
            if header[0] == FAILED:
                raise _failed_elsewhere(said_in(data)["reason"])
            if header[0] != FORM:
                self._post()
                return data, header
            self._learn(said_in(data), tag)

    def _learn(self, said: dict[str, Any], tag: Tag) -> None:
        """A form that is new, and perhaps larger buffers for it."""
        self._forms.append(Form.parse(said["layout"], self._direct is not None, len(self._forms)))
        if "room" not in said:
            self._post()
            return
        while self._under_way:  # nothing was sent to them, so that they are done
            self._wait(self._under_way.popleft()[0], f"to send {tag}")
        self._room = said["room"]
        self._tag += 1
        for _ in range(self.depth):
            self._post()

    def _past_the_host(self, direct: Direct, packed: Packed, tag: Tag) -> Message:
        try:
            work, payload = direct.receive(packed)
        except RuntimeError as error:
            raise self._unreachable(error) from error
        self._wait(work, f"to send the tensors of {tag}")
        return packed.views(payload)

    def _post(self) -> None:
        work: Any
        buffer = self._staging.buffer(self._room)
        try:
            work = self._group.receive(buffer, self.peer.rank, self._tag)
        except RuntimeError as error:
            work = _Gone(
                error
                # no harm if the sender has finished, and all it had to say is in buffers posted
                # before
            )
        self._under_way.append((work, buffer))


class _Gone:
    """A receive that cannot be posted any more; waiting for it says why."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def wait(self, limit: timedelta) -> None:
        raise self._error


def _failed_elsewhere(reason: str) -> TransportError:
    return TransportError(f"the run ended elsewhere: {reason}", reason)
