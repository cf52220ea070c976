"""What comes before what on a device: threads, streams and transfers, and the memory they share.

Each of them is an actor whose deeds are in order. It knows how far it has come to know every other
(a vector clock), and learns from what it waits for. Whoever touches memory must know of the last
write to it, and who writes of all reads.

What should not be is a `Fault`, of one of these kinds:

- wait: the computing thread waits for the device
- order: a stream, or the host, uses memory that it is not ordered on
- reuse: pinned memory serves again before the copy from or to it is done
- freed: memory goes back to the stream that it came from while another one still uses it
- device: a thread asks a device for something while it stands on another, by default on device 0
- spin: a thread waits for an event that takes a core to itself
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Fault(NamedTuple):
    kind: str
    where: str  # "file.function" of the package
    what: str


FAULTS: list[Fault] = []


def _fault(kind: str, what: str) -> None:
    FAULTS.append(Fault(kind, _where(), what))


def _where() -> str:
    frame: Any = sys._getframe()
    while frame is not None and "/ds_local/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    file = frame.f_code.co_filename.rpartition("/")[2].removesuffix(".py")
    return f"{file}.{frame.f_code.co_name}"


# --- who does something, and what it knows --------------------------------------------------------


class Actor:
    """A thread, a stream or a transfer: whatever it does is in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[Actor, int] = {}

    def learn(self, known: dict[Actor, int]) -> None:
        own = self.known
        for actor, time in known.items():
            if time > own.get(actor, 0):
                own[actor] = time

    def act(self) -> int:
        self.known[self] = self.known.get(self, 0) + 1
        return self.known[self]

    def knows(self, actor: Actor, time: int) -> bool:
        return self.known.get(actor, 0) >= time


class _Thread(threading.local):
    def __init__(self) -> None:
        self.actor = Actor(f"thread {threading.current_thread().name}")
        self.device = 0
        self.streams: dict[int, Stream] = {}  # current ones, by device
        self.computes = False


THREAD = _Thread()


def wait(for_: dict[Actor, int], what: str) -> None:
    if THREAD.computes:
        _fault("wait", what)
    THREAD.actor.learn(for_)


def ask(device: int, what: str) -> None:
    if THREAD.device != device:
        _fault("device", f"{what} of device {device} in a thread that is on {THREAD.device}")


def index_of(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return THREAD.device if index is None else index


class Stream(Actor):
    """For torch.cuda.Stream."""

    def __init__(self, device: Any = None) -> None:
        super().__init__(f"a stream of cuda:{index_of(device)}")
        self.device = torch.device("cuda", index_of(device))
        # what has come back since the last launch: who uses it, and where it was let go
        self.freed: list[tuple[dict[Actor, int], str]] = []

    def launch(self) -> None:
        """Something goes onto the stream: what the host has done is done before. It may be given
        the memory that has come back."""
        ask(self.device.index, "work")
        self.learn(THREAD.actor.known)
        while self.freed:
            used, where = self.freed.pop()
            for actor, time in used.items():
                if not self.knows(actor, time):
                    what = f"{actor.name} still uses memory that has gone back to {self.name}"
                    FAULTS.append(Fault("freed", where, what))

    def wait_stream(self, other: Stream) -> None:
        self.learn(other.known)

    def wait_event(self, event: Event) -> None:
        self.learn(event.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        ask(self.device.index, "a stream")
        wait(self.known, "a stream is waited for")


class Event:
    """For torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.blocking = blocking
        self.known: dict[Actor, int] = {}
        self.device: torch.device | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        ask(stream.device.index, "an event")
        stream.learn(THREAD.actor.known)
        self.known, self.device = dict(stream.known), stream.device

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.device is not None:
            ask(self.device.index, "an event")
        if not self.blocking:
            _fault("spin", "an event made without blocking=True is waited for")
        wait(self.known, "an event is waited for")


_FIRST_STREAMS: dict[int, Stream] = {}  # of each device the one that work goes to by default


def begin() -> None:
    """Forget what was found before, and what has come back since."""
    FAULTS.clear()
    for stream in _FIRST_STREAMS.values():
        stream.freed.clear()


def current_stream(device: Any = None) -> Stream:
    index = index_of(device)
    if index not in THREAD.streams:
        return _FIRST_STREAMS.setdefault(index, Stream(index))
    return THREAD.streams[index]


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = current_stream(stream.device)
    THREAD.streams[stream.device.index] = stream
    try:
        yield
    finally:
        THREAD.streams[stream.device.index] = before


def set_device(device: Any) -> None:
    THREAD.device = index_of(device)


def synchronize(device: Any = None) -> None:
    ask(index_of(device), "a device")
    wait(current_stream(device).known, "a device is waited for")


# --- memory ---------------------------------------------------------------------------------------


class Use(NamedTuple):
    """Of some bytes of a memory."""

    actor: Actor
    time: int
    writes: bool
    bytes: range


class Memory:
    """Bytes of a device, or pinned ones of the host, and who has used them.

    Args:
        home: the stream that they were allocated on; None on the host.
    """

    def __init__(self, home: Stream | None) -> None:
        self.home = home
        self.uses: list[Use] = []  # that whoever comes next must know of
        self.recorded: set[Actor] = set()  # by `record_stream`
        if home is not None:
            self.newest: dict[Actor, int] = {}
            weakref.finalize(self, _freed, home, self.newest, self.recorded)

    def access(self, actor: Actor, writes: bool, tensor: Tensor) -> None:
        bytes_ = _bytes_of(tensor)
        new = Use(actor, actor.act(), writes, bytes_)
        kept = []
        for use in self.uses:
            apart = use.bytes.stop <= bytes_.start or bytes_.stop <= use.bytes.start
            known = actor.knows(use.actor, use.time)
            if not (known or apart) and (writes or use.writes):
                does = "writes to" if writes else "reads"
                memory = "a tensor" if self.home else "pinned memory"
                kind = "order" if self.home or not writes else "reuse"
                did = "written to" if use.writes else "read"
                _fault(kind, f"{actor.name} {does} {memory} being {did} by {use.actor.name}")
            inside = bytes_.start <= use.bytes.start and use.bytes.stop <= bytes_.stop
            if not (known and inside and (writes or not use.writes)):
                kept.append(use)
        self.uses = [*kept, new]
        if self.home is not None:
            self.newest[actor] = new.time


def _bytes_of(tensor: Tensor) -> range:
    """The least range of its storage that holds it."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.storage_offset(), tensor.dtype.itemsize
    return range(start * size, (start + last + 1) * size if tensor.numel() else start * size)


def _freed(home: Stream, used: dict[Actor, int], recorded: set[Actor]) -> None:
    """The allocator looks at what streams named by `record_stream` have before them."""
    knowing = [home, *recorded]
    unknown = {a: t for a, t in used.items() if not any(k is a or k.knows(a, t) for k in knowing)}
    home.freed.append((unknown, _where()))
