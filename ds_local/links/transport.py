"""One-way links between neighbouring segments.

A message is a dict of named tensors with a tag (step, micro-batch). Segments of one stage hand over
in memory; stages talk over a two-rank process group for each edge and direction. The receiver keeps
`depth` receives posted ahead, so a message lands while its stage computes; the sender keeps each
buffer alive until it is gone and waits once `depth` messages are under way. Gloo moves bytes only
after the receive is posted, which is why the ring of receives matters.

A message goes through host memory over gloo, all of it or (`Direct`) all but what goes from device
to device over NCCL.

A link's shapes are fixed by its first message. Everything that waits has a limit and names whom it
waited for.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_local.errors import LostConnection, TransportError
from ds_local.links.staging import Departures, Direct, Staging
from ds_local.links.waiting import Waiter, is_lost

_SPEC_BYTES = 16384  # of the first message, which says what all others look like
_HEADER = 4  # int64 entries: code, step, micro-batch, flags
_MESSAGE, _FAILED = 1, 2
_ALIGN = 16
_REASON_BYTES = 1024
_FAREWELL_SECONDS = 5.0  # spent on telling the neighbours about a failure


Message = Mapping[str, Tensor]


class Tag(NamedTuple):
    """What a message belongs to."""

    step: int
    micro_batch: int
    last_step: bool = False  # the sender will stop after this step
    data_ends: bool = False  # there is none for another step

    def __str__(self) -> str:
        return f"step {self.step}, micro-batch {self.micro_batch}"


class MemoryLink:
    """Between two segments of the same stage: both ends in one object, nothing waits.

    Tensors are copied, as between stages: what the upper segment does to one in place, the lower
    segment and its head never see.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self.num_bytes = 0
        self._queue: deque[tuple[Tag, Message]] = deque()

    def send(self, tag: Tag, tensors: Message) -> None:
        self._queue.append((tag, {name: _copy_of(tensor) for name, tensor in tensors.items()}))

    def receive(self, tag: Tag) -> tuple[Tag, Message]:
        for position, (found, tensors) in enumerate(self._queue):
            if found[:2] == tag[:2]:
                del self._queue[position]
                return found, tensors
        raise TransportError(f"no message for {tag} within the stage")

    def flush(self) -> None:
        """Nothing is ever under way."""

    def fail(self, reason: str) -> None:
        """The other end is this very stage."""


def _copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a link, for error messages."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


class _Spec(NamedTuple):
    """What a tensor of a message looks like."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool  # it did not lie on the sender's device, and does not go to the receiver's

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _specs_of(tensors: Message, device: torch.device) -> list[_Spec]:
    return [
        _Spec(name, tuple(t.shape), t.dtype, t.device.type != device.type)
        for name, t in tensors.items()
    ]


class _Layout:
    """Where each tensor of a message lies in its byte buffer, behind `reserved` bytes; the buffer
    has `least` bytes."""

    def __init__(self, specs: Sequence[_Spec], reserved: int = 0, least: int = 0) -> None:
        self.specs = list(specs)
        self.offsets = []
        position = reserved
        for spec in specs:
            position = -(-position // _ALIGN) * _ALIGN
            self.offsets.append(position)
            position += spec.num_bytes
        self.num_bytes = max(position, least)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            spec.name: buffer[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for offset, spec in zip(self.offsets, self.specs, strict=True)
        }


class _Form:
    """What every message of a link looks like: the buffer that goes through the host, and the one
    that does not."""

    def __init__(self, specs: Sequence[_Spec], direct: bool) -> None:
        self.specs = list(specs)
        room = (
            _REASON_BYTES if direct else 0
        )  # other messages have room enough for why a run failed
        self.staged = _Layout(
            [spec for spec in specs if spec.on_host or not direct], _HEADER * 8, room
        )
        self.direct = _Layout([spec for spec in specs if direct and not spec.on_host])
        self.num_bytes = self.staged.num_bytes + self.direct.num_bytes

    @classmethod
    def parse(cls, described: list[tuple[str, list[int], str, bool]], direct: bool) -> _Form:
        return cls(
            [
                _Spec(name, tuple(shape), getattr(torch, dtype), host)
                for name, shape, dtype, host in described
            ],
            direct,
        )


def _described(specs: Sequence[_Spec]) -> list[tuple[str, list[int], str, bool]]:
    return [
        (name, list(shape), str(dtype).removeprefix("torch."), on_host)
        for name, shape, dtype, on_host in specs
    ]


def _difference(old: Sequence[_Spec], new: Sequence[_Spec]) -> tuple[str, str]:
    """What is only in one of two descriptions of a message, in words."""

    def words(specs: Iterable[_Spec]) -> str:
        kinds = _described([spec for spec in specs if spec.num_bytes or "=" in spec.name])
        return ", ".join(f"{name} {dtype} {shape}" for name, shape, dtype, _ in kinds) or "less"

    return words(s for s in old if s not in new), words(s for s in new if s not in old)


class _Buffer:
    """The bytes of a message, and its header and tensors in them."""

    def __init__(self, layout: _Layout, data: Tensor) -> None:
        self.data = data
        self.header = data[: _HEADER * 8].view(torch.int64).numpy()
        self.tensors = layout.views(data)


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
        self._form: _Form | None = None
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
        self._free: list[_Buffer] = []
        self._opening: Any = None  # the message about shapes, which takes no place from the others
        self._departures = Departures()

    def send(self, tag: Tag, tensors: Message) -> None:
        """Hand the tensors over; they are copied. The caller may drop them at once; on a device the
        copy may still run, so nothing may be written into them in place.

        Raises:
            TransportError: when the shapes differ from the first message's, or the peer is gone or
                does not keep up.
        """
        specs = _specs_of(tensors, self._staging.device)
        if self._form is None:
            self._form = _Form(specs, self._direct is not None)
            self._opening = self._post(_spec_buffer({"layout": _described(specs)}))
        elif specs != self._form.specs:
            old, new = _difference(self._form.specs, specs)
            raise TransportError(
                f"the {self.name} to {self.peer} was opened for {old} but {tag} has {new}; shapes "
                "must stay the same: drop incomplete batches, pad the others to one length, those "
                "of evaluation too, and let layers pass on the same kinds of values every time"
            )
        staged = self._form.staged
        buffer = (
            self._free.pop()
            if self._free
            else _Buffer(staged, self._staging.buffer(staged.num_bytes))
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
        if isinstance(buffer, _Buffer):
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
            buffer = _spec_buffer({"failed": reason})
        else:
            size = self._form.staged.num_bytes
            buffer = torch.zeros(size, dtype=torch.uint8)
            text = torch.frombuffer(bytearray(reason.encode()), dtype=torch.uint8)[
                : size - _HEADER * 8
            ]
            buffer[_HEADER * 8 : _HEADER * 8 + len(text)] = text
            buffer[: _HEADER * 8].view(torch.int64)[0] = _FAILED
        self.timeout_seconds = min(self.timeout_seconds, _FAREWELL_SECONDS)
        try:
            self._under_way.append(self._post(buffer))
            self.flush()
        except RuntimeError:
            return  # the peer is gone as well


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
        buffer = _Buffer(form.staged, data)
        code, step, micro_batch, flags = buffer.header.tolist()
        if code == _FAILED:
            raise _failed_elsewhere(_text(data[_HEADER * 8 :]))
        found = Tag(step, micro_batch, bool(flags & 1), bool(flags & 2))
        if code != _MESSAGE or not tag.step <= step <= tag.step + self.steps_ahead:
            raise TransportError(
                f"the {self.name} from {self.peer} brought {found}, expected {tag}; do all ranks run the same configuration?"
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

    def _past_the_host(self, direct: Direct, layout: _Layout, tag: Tag) -> Message:
        try:
            work, payload = direct.receive(layout)
        except RuntimeError as error:
            raise self._unreachable(error) from error
        self._wait(work, f"to send the tensors of {tag}")
        return layout.views(payload)

    def _open(self, tag: Tag) -> _Form:
        """Learn the shapes from the first message and post the receives."""
        buffer = torch.empty(_SPEC_BYTES, dtype=torch.uint8)
        self._post(buffer)
        work, _ = self._under_way.popleft()
        self._wait(work, f"to send its first message ({tag})")
        spec = json.loads(_text(buffer))
        if "failed" in spec:
            raise _failed_elsewhere(spec["failed"])
        form = _Form.parse(spec["layout"], self._direct is not None)
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
            )  # no harm if the sender has finished, and all it had to say is in buffers posted before
        self._under_way.append((work, buffer))


class _Gone:
    """A receive that cannot be posted any more; waiting for it says why."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def wait(self, limit: timedelta) -> None:
        raise self._error


def _failed_elsewhere(reason: str) -> TransportError:
    return TransportError(f"the run ended elsewhere: {reason}", reason)


def _spec_buffer(spec: dict[str, Any]) -> Tensor:
    data = json.dumps(spec).encode()
    if len(data) > _SPEC_BYTES:
        raise TransportError(
            f"the shapes of a message take {len(data)} bytes to describe, at most {_SPEC_BYTES} fit; send fewer tensors"
        )
    buffer = torch.zeros(_SPEC_BYTES, dtype=torch.uint8)
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return buffer


def _text(buffer: Tensor) -> str:
    return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")


# --- links of a rank ------------------------------------------------------------------------------

End = MemoryLink | Sender | Receiver


def make_end(
    name: str,
    stage: int,
    source: int,
    target: int,
    ranks: Sequence[Sequence[int]],
    depth: int,
    timeout_seconds: float,
    device: torch.device,
    past_host: bool = False,
) -> End | None:
    """This rank's end of a link from stage `source` to stage `target`, None when it has none. A
    collective call.

    Args:
        stage: this rank's stage.
        ranks: for each replica the global rank of each stage.
        past_host: tensors on the device do not go through host memory.
    """
    if source == target:
        return MemoryLink() if stage == source else None
    mine: End | None = None
    for replica in ranks:
        pair = [replica[source], replica[target]]
        group = dist.new_group(pair, backend="gloo")
        beside = dist.new_group(pair, backend=Direct.backend(device)) if past_host else None
        if dist.get_rank() in pair:
            is_source = dist.get_rank() == pair[0]
            peer = Peer(target, pair[1]) if is_source else Peer(source, pair[0])
            direct = Direct(device, beside, peer.rank) if past_host else None
            mine = (Sender if is_source else Receiver)(
                name, group, peer, depth, timeout_seconds, Staging(device), direct
            )
    return mine
