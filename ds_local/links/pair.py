"""The two ends of a link between two stages, over a two-rank process group.

The receiver keeps `depth` receives posted ahead, so a message lands while its stage computes; the
sender keeps each buffer alive until it is gone and waits once `depth` messages are under way. Gloo
moves bytes only after the receive is posted, which is why the ring of receives matters.

A message goes through host memory over gloo, all of it or (`Direct`) all but what goes from device
to device over NCCL. A link's shapes are fixed by its first message.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_local.errors import LostConnection, TransportError
from ds_local.links.buffers import (
    HEADER,
    SPEC_BYTES,
    Buffer,
    Form,
    Message,
    Packed,
    Tag,
    described,
    difference,
    spec_buffer,
    specs_of,
    text_of,
)
from ds_local.links.staging import Departures, Direct, Staging
from ds_local.links.waiting import Waiter, is_lost

_MESSAGE, _FAILED = 1, 2
_FAREWELL_SECONDS = 3.0  # spent on telling the neighbours about a failure


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a link, for error messages."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


class _GroupEnd(Waiter):
    """What both ends of a link between two stages share.

    Args:
        name: what the link carries, for messages.
        group: a two-rank process group that nothing else uses.
        peer: the other end.
        depth: messages under way before the sender waits; receives posted ahead.
        timeout_seconds: longest wait.
        staging: the way between host buffers and the device that the tensors are on.
        direct: the way past the host, if tensors on the device take it.
    """

    def __init__(
        self,
        name: str,
        group: Any,
        peer: Peer,
        depth: int,
        timeout_seconds: float,
        staging: Staging,
        direct: Direct | None = None,
    ) -> None:
        super().__init__(timeout_seconds)
        self.name = name
        self.peer = peer
        self.depth = depth
        self.num_bytes = 0  # through this end, headers included
        self._group = group
        self._form: Form | None = None
        self._staging = staging
        self._direct = direct
        self._under_way: deque[tuple[Any, Any]] = (
            deque()
        )  # (work, what must stay alive until it is done)

    @property
    def message_bytes(self) -> int:
        """Size of a message, 0 before the first."""
        return self._form.num_bytes if self._form else 0

    def _wait(self, work: Any, purpose: str) -> None:
        self.wait_for(work, self.peer.rank, str(self.peer), f"{purpose} on the {self.name}")

    def _unreachable(self, error: RuntimeError) -> RuntimeError:
        """What an operation that could not be started means."""
        if not is_lost(error):
            return error
        return LostConnection(f"cannot reach {self.peer} on the {self.name}")


class Sender(_GroupEnd):
    """The sending end of a link between two stages."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._free: list[Buffer] = []
        self._opening: Any = None  # the message about shapes, which takes no place from the others
        self._departures = Departures(self._staging.device)

    def send(self, tag: Tag, tensors: Message) -> None:
        """Hand the tensors over; they are copied. The caller may drop them at once; on a device the
        copy may still run, so nothing may be written into them in place.

        Raises:
            TransportError: when the shapes differ from the first message's, or the peer is gone or
                does not keep up.
        """
        specs = specs_of(tensors, self._staging.device)
        if self._form is None:
            self._form = Form(specs, self._direct is not None)
            self._opening = self._post(spec_buffer({"layout": described(specs)}))
        elif specs != self._form.specs:
            old, new = difference(self._form.specs, specs)
            raise TransportError(
                f"the {self.name} to {self.peer} was opened for {old} but {tag} has {new}; shapes "
                "must stay the same: drop incomplete batches, pad the others to one length, those "
                "of evaluation too, and let layers pass on the same kinds of values every time"
            )
        staged = self._form.staged
        buffer = (
            self._free.pop()
            if self._free
            else Buffer(staged, self._staging.buffer(staged.num_bytes))
        )
        copied = self._staging.to_host(buffer.tensors, tensors)
        flags = tag.last_step + 2 * tag.data_ends
        buffer.header[:] = _MESSAGE, tag.step, tag.micro_batch, flags
        while len(self._under_way) >= self.depth:
            self._take_back(f"to take a message ({tag} is next)")
        try:
            start = partial(self._start, buffer.data)
            works = [start() if copied is None else self._departures.after(copied, start)]
            if self._direct is not None:
                works.append(self._direct.send(self._form.direct, tensors))
        except RuntimeError as error:
            raise self._unreachable(error) from error
        self._under_way.append((works, buffer))
        self.num_bytes += self._form.num_bytes

    def _take_back(self, purpose: str) -> None:
        """Wait for the oldest message; its buffer may serve again."""
        works, buffer = self._under_way.popleft()
        for work in works:
            self._wait(work, purpose)
        self._opening = None  # it went first
        if isinstance(buffer, Buffer):
            self._free.append(buffer)

    def _start(self, data: Tensor) -> Any:
        return dist.isend(data, self.peer.rank, self._group)

    def _post(self, data: Tensor) -> tuple[list[Any], Tensor]:
        try:
            return [self._start(data)], data
        except RuntimeError as error:
            raise self._unreachable(error) from error

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        while self._under_way:
            self._take_back("to take the last messages")

    def fail(self, reason: str) -> None:
        """Tell the receiver why nothing more will come. Best effort: never raises, waits a few
        seconds at most."""
        if self._form is None:
            buffer = spec_buffer({"failed": reason})
        else:
            size = self._form.staged.num_bytes
            buffer = torch.zeros(size, dtype=torch.uint8)
            text = torch.frombuffer(bytearray(reason.encode()), dtype=torch.uint8)[
                : size - HEADER * 8
            ]
            buffer[HEADER * 8 : HEADER * 8 + len(text)] = text
            buffer[: HEADER * 8].view(torch.int64)[0] = _FAILED
        self.timeout_seconds = min(self.timeout_seconds, _FAREWELL_SECONDS)
        try:
            self._under_way.append(self._post(buffer))
            self.flush()
        except RuntimeError:
            self._under_way.clear()  # the peer is gone as well: nobody waits for it once more


class Receiver(_GroupEnd):
    """The receiving end of a link between two stages."""

    steps_ahead = 0  # that messages may be of, beyond the step that is asked for

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
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
        form = self._form = self._form or self._open(tag)
        work, data = self._under_way.popleft()
        self._wait(work, f"to send {tag}")
        self._post(self._staging.buffer(form.staged.num_bytes))
        buffer = Buffer(form.staged, data)
        code, step, micro_batch, flags = buffer.header.tolist()
        if code == _FAILED:
            raise _failed_elsewhere(text_of(data[HEADER * 8 :]))
        found = Tag(step, micro_batch, bool(flags & 1), bool(flags & 2))
        if code != _MESSAGE or not tag.step <= step <= tag.step + self.steps_ahead:
            raise TransportError(
                f"the {self.name} from {self.peer} brought {found}, expected {tag}; do all ranks "
                "run the same configuration?"
            )
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

    def _past_the_host(self, direct: Direct, packed: Packed, tag: Tag) -> Message:
        try:
            work, payload = direct.receive(packed)
        except RuntimeError as error:
            raise self._unreachable(error) from error
        self._wait(work, f"to send the tensors of {tag}")
        return packed.views(payload)

    def _open(self, tag: Tag) -> Form:
        """Learn the shapes from the first message and post the receives."""
        buffer = torch.empty(SPEC_BYTES, dtype=torch.uint8)
        self._post(buffer)
        work, _ = self._under_way.popleft()
        self._wait(work, f"to send its first message ({tag})")
        spec = json.loads(text_of(buffer))
        if "failed" in spec:
            raise _failed_elsewhere(spec["failed"])
        form = Form.parse(spec["layout"], self._direct is not None)
        for _ in range(self.depth):
            self._post(self._staging.buffer(form.staged.num_bytes))
        return form

    def _post(self, buffer: Tensor) -> None:
        work: Any
        try:
            work = dist.irecv(buffer, self.peer.rank, self._group)
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
