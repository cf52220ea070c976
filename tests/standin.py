"""A stand-in for a CUDA device that records what real code does with it, on a CPU.

Inside `standin(1)` the calling thread computes on a pretended "cuda:1". A tensor there is a
`Pretend`: it says it lies on the device, its numbers lie on the host, and every operation is done
at once. What a device would do in its own time is kept as an order instead: threads and streams are
actors, each knows how far it has come to know every other (a vector clock), and learns from what it
waits for. Whatever touches memory must know of the last write to it, and a write of all reads.

What should not be is a `Fault`, of one of these kinds:

- wait: the computing thread waits for the device
- order: a stream, or the host, uses memory that it is not ordered on
- reuse: pinned memory serves again before the copy from or to it is done
- freed: memory goes back to the stream that it came from while another one still uses it
- device: a thread asks a device for something while it stands on another, by default on device 0
- spin: a thread waits for an event that takes a core to itself

Not modelled: how long anything takes, what a kernel does inside, memory that runs out.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten


class Fault(NamedTuple):
    kind: str
    where: str  # "file.function" of the package
    what: str


FAULTS: list[Fault] = []


def _fault(kind: str, what: str) -> None:
    frame: Any = sys._getframe()
    while frame is not None and "/ds_local/" not in frame.f_code.co_filename:
        frame = frame.f_back
    where = "elsewhere"
    if frame is not None:
        file = frame.f_code.co_filename.rpartition("/")[2].removesuffix(".py")
        where = f"{file}.{frame.f_code.co_name}"
    FAULTS.append(Fault(kind, where, what))


# --- who does something, and what it knows --------------------------------------------------------


class Actor:
    """A thread, a stream or a transfer: whatever it does is in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[Actor, int] = {}

    def learn(self, known: dict[Actor, int]) -> None:
        for actor, time in known.items():
            self.known[actor] = max(time, self.known.get(actor, 0))

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


def _wait(for_: dict[Actor, int], what: str) -> None:
    if THREAD.computes:
        _fault("wait", what)
    THREAD.actor.learn(for_)


def _ask(device: int, what: str) -> None:
    if THREAD.device != device:
        _fault("device", f"{what} of device {device} in a thread that is on {THREAD.device}")


def _index(device: Any = None) -> int:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or 0)
    return THREAD.device if device.index is None else device.index


class Stream(Actor):
    """For torch.cuda.Stream."""

    def __init__(self, device: Any = None) -> None:
        super().__init__(f"a stream of cuda:{_index(device)}")
        self.device = torch.device("cuda", _index(device))

    def _take_in(self) -> None:
        """A launch: what the host has done is done before."""
        _ask(self.device.index, "work")
        self.learn(THREAD.actor.known)

    def wait_stream(self, other: Stream) -> None:
        self.learn(other.known)

    def wait_event(self, event: Event) -> None:
        self.learn(event.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _ask(self.device.index, "a stream")
        _wait(self.known, "a stream is waited for")


class Event:
    """For torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.blocking = blocking
        self.known: dict[Actor, int] = {}
        self.device: torch.device | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        stream._take_in()
        self.known, self.device = dict(stream.known), stream.device

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.device is not None:
            _ask(self.device.index, "an event")
        if not self.blocking:
            _fault("spin", "an event made without blocking=True is waited for")
        _wait(self.known, "an event is waited for")


_FIRST_STREAMS: dict[int, Stream] = {}  # of each device the one that work goes to by default


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    if index not in THREAD.streams:
        return _FIRST_STREAMS.setdefault(index, Stream(index))
    return THREAD.streams[index]


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = current_stream(stream.device)
    THREAD.streams[stream.device.index] = stream
    try:
        yield
    finally:
        THREAD.streams[stream.device.index] = before


def _set_device(device: Any) -> None:
    THREAD.device = _index(device)


def _synchronize(device: Any = None) -> None:
    _ask(_index(device), "a device")
    _wait(current_stream(device).known, "a device is waited for")


# --- memory ---------------------------------------------------------------------------------------


class Memory:
    """Bytes of a device, or pinned ones of the host, and who has used them.

    Args:
        home: the stream that they were allocated on; None on the host.
    """

    def __init__(self, home: Stream | None) -> None:
        self.home = home
        self.written: tuple[Actor, int] | None = None
        self.read: dict[Actor, int] = {}  # since then
        self.recorded: set[Actor] = set()  # by `record_stream`
        if home is not None:
            self.used: dict[Actor, int] = {}
            weakref.finalize(self, _freed, home, self.used, self.recorded)

    def access(self, actor: Actor, writes: bool) -> None:
        others = [self.written] if self.written else []
        if writes:
            others += self.read.items()
        for other, time in others:
            if not actor.knows(other, time):
                does = "writes to" if writes else "reads"
                memory = "a tensor" if self.home else "pinned memory"
                kind = "order" if self.home or not writes else "reuse"
                _fault(kind, f"{actor.name} {does} {memory} before {other.name} is done with it")
        time = actor.act()
        if writes:
            self.written, self.read = (actor, time), {}
        else:
            self.read[actor] = time
        if self.home is not None:
            self.used[actor] = time


def _freed(home: Stream, used: dict[Actor, int], recorded: set[Actor]) -> None:
    for actor, time in used.items():
        if actor is not home and actor not in recorded and not home.knows(actor, time):
            _fault("freed", f"{actor.name} still uses memory that goes back to {home.name}")


_ON_DEVICE: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
_PINNED: dict[int, tuple[Memory, Any]] = {}  # with the storage, so that no other takes its number


def _number(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _pinned(tensor: Tensor) -> Memory | None:
    return _PINNED.get(_number(tensor), (None,))[0] if _PINNED and not _is_odd(tensor) else None


def _is_odd(tensor: Tensor) -> bool:
    return isinstance(tensor, Pretend) or tensor.layout is not torch.strided or tensor.is_meta


def _pin(tensor: Tensor) -> Tensor:
    _PINNED[_number(tensor)] = Memory(None), tensor.untyped_storage()
    return tensor


class Pretend(Tensor):
    """A tensor that says it is on a device. Only Python sees that: to torch's own code it lies on
    the host, which knows of no device here."""

    numbers: Tensor
    memory: Memory
    place: torch.device
    is_cuda = True
    device = property(lambda self: self.place)

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> Pretend:
        strides, offset = numbers.stride(), numbers.storage_offset()
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, strides=strides, storage_offset=offset, dtype=numbers.dtype
        )

    def __init__(self, numbers: Tensor, device: torch.device) -> None:
        self.numbers, self.place = numbers, device
        number = _number(numbers)
        found = _ON_DEVICE.get(number)
        if found is None:
            _ON_DEVICE[number] = found = Memory(current_stream(device))
        self.memory = found

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({list(self.shape)}, {self.device})"

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if _crosses(self, device):
            moved = {"dtype": dtype, "device": device, "non_blocking": non_blocking}
            return aten._to_copy.default(self, **moved)
        return super().to(dtype=dtype or self.dtype, copy=copy)

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].numbers, args[0].memory = args[1].numbers, args[1].memory
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# --- operations -----------------------------------------------------------------------------------

_READ_BY_HOST = {  # their result, or its shape, depends on numbers
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten.is_pinned.default:
        return _pinned(args[0]) is not None
    if func is aten._pin_memory.default:
        return _pin(args[0].clone())
    if func is aten._to_copy.default and _crosses(args[0], kwargs.get("device")):
        return _moved(args[0], **kwargs)
    if func is aten.copy_.default and isinstance(args[0], Pretend) != isinstance(args[1], Pretend):
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return _copied(args[0], args[1], blocking)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    device = next((t.device for t in tensors if isinstance(t, Pretend)), None)
    if device is None and torch.device(kwargs.get("device") or "cpu").type == "cuda":
        device = torch.device("cuda", _index(kwargs["device"]))
    return _on_host(func, args, kwargs) if device is None else _on(device, func, args, kwargs)


def _crosses(tensor: Tensor, device: Any) -> bool:
    here = "cuda" if isinstance(tensor, Pretend) else "cpu"
    return device is not None and torch.device(device).type in {"cpu", "cuda"} - {here}


def _accesses(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """Each tensor whose memory an operation touches, and whether it is written to."""
    name = func._schema.name
    if func.is_view or "empty" in name or name in ("aten::detach", "aten::lift_fresh"):
        return
    for position, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name, args[position] if position < len(args) else None)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_flatten(value)[0]:
            if isinstance(tensor, Tensor):
                yield tensor, writes


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pins = kwargs.pop("pin_memory", None)
    for tensor, writes in _accesses(func, args, kwargs) if _PINNED else ():
        if memory := _pinned(tensor):
            memory.access(THREAD.actor, writes)
    result = func(*args, **kwargs)
    return _pin(result) if pins else result


def _on(device: torch.device, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    stream = current_stream(device)
    stream._take_in()
    for tensor, writes in _accesses(func, args, kwargs):
        if isinstance(tensor, Pretend):
            tensor.memory.access(stream, writes)
        elif func in _INDEXED:
            _wait(stream.known, f"{func} takes an index from the host")
        elif tensor.dim():
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got one of {device} and "
                "one of cpu"
            )
    by_mask = func in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
    if func in _READ_BY_HOST or by_mask:
        _wait(stream.known, f"{func} on a device tensor")
    outside: dict[int, Pretend] = {}

    def inner(tensor: Pretend) -> Tensor:
        outside[id(tensor.numbers)] = tensor
        return tensor.numbers

    def wrapped(tensor: Tensor) -> Tensor:
        if id(tensor) in outside:
            return outside[id(tensor)]
        is_new = _number(tensor) not in _ON_DEVICE
        pretend = Pretend(tensor, device)
        if is_new and "empty" not in func._schema.name:
            pretend.memory.access(stream, True)
        return pretend

    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map_only(Pretend, inner, (args, kwargs))
    return tree_map_only(Tensor, wrapped, func(*args, **kwargs))


def _moved(source: Tensor, **kwargs: Any) -> Tensor:
    """`source.to(...)` between host and device."""
    blocking = not kwargs.pop("non_blocking", False)
    device, pins = torch.device(kwargs.pop("device")), kwargs.pop("pin_memory", False)
    inner = getattr(source, "numbers", source)
    empty = torch.empty_like(inner, dtype=kwargs.get("dtype") or inner.dtype)
    if device.type == "cpu":
        return _copied(_pin(empty) if pins else empty, source, blocking)
    return _copied(Pretend(empty, torch.device("cuda", _index(device))), source, blocking)


def _copied(target: Tensor, source: Tensor, blocking: bool) -> Tensor:
    pretend = target if isinstance(target, Pretend) else source
    host = source if pretend is target else target
    stream = current_stream(pretend.device)
    stream._take_in()
    source_inner, target_inner = (getattr(t, "numbers", t) for t in (source, target))
    target_inner.copy_(source_inner)
    pretend.memory.access(stream, pretend is target)  # type: ignore[attr-defined]
    pinned = _pinned(host)
    if pinned is not None:
        pinned.access(stream, host is target)
    if blocking or pinned is None:
        memory = "pinned" if pinned else "pageable"
        _wait(stream.known, f"a {'blocking ' * blocking}copy, {memory} memory on the host")
    return target


class _Work:
    """A send or receive of pinned memory: an actor that uses it until somebody has waited."""

    def __init__(self, work: Any, actor: Actor) -> None:
        self._work, self._actor = work, actor

    def wait(self, *limit: Any) -> Any:
        done = self._work.wait(*limit)
        THREAD.actor.learn(self._actor.known)
        return done


def _seen(operation: Callable[..., Any], writes: bool) -> Callable[..., Any]:
    def posted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        actor = Actor("a receive" if writes else "a send")
        actor.learn(THREAD.actor.known)
        if memory := _pinned(tensor):
            memory.access(actor, writes)
        return _Work(operation(tensor, *args, **kwargs), actor)

    return posted


@contextmanager
def standin(device: int = 1) -> Iterator[list[Fault]]:
    """Inside, this thread computes on a device of that number. Gives the faults, as they come."""
    FAULTS.clear()
    cuda = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "stream": _stream,
        "set_device": _set_device,
        "current_device": _index,
        "synchronize": _synchronize,
        "device_count": lambda: device + 1,
        "_lazy_init": lambda: None,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.object(dist, "isend", _seen(dist.isend, False)))
        stack.enter_context(mock.patch.object(dist, "irecv", _seen(dist.irecv, True)))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.enter_context(mock.patch.multiple(THREAD, device=device, computes=True))
        stack.enter_context(_Mode())
        yield FAULTS
