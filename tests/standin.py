"""A stand-in for a CUDA device, on a CPU, that records what real code does with it.

Inside `standin(1)` the calling thread computes on a pretended "cuda:1". A tensor there is a
`Pretend`: it says it lies on the device, its numbers lie on the host, and every operation is done
at once. What a device would do in its own time is kept as an order instead, see `device_order`,
which says what a fault is.

Not modelled: how long anything takes, what a kernel does inside, memory that runs out. Memory that
torch itself gives out again, pinned or on the device, is always fresh here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from device_order import (
    FAULTS,
    THREAD,
    Actor,
    Event,
    Fault,
    Memory,
    Stream,
    begin,
    current_stream,
    index_of,
    on_stream,
    set_device,
    synchronize,
    wait,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_local.links.groups import HostGroup

aten = torch.ops.aten

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


_HOST = torch.device("cpu", 0)  # torch's own code says "cpu", which is where it sees all tensors


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
        return Tensor._make_wrapper_subclass(
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
        if device is not None and device.type == "cpu":
            moved = {"dtype": dtype, "device": _HOST, "non_blocking": non_blocking}
            return aten._to_copy.default(self, **moved)
        return super().to(dtype=dtype or self.dtype, copy=copy)

    def cpu(self) -> Tensor:
        return self.to(_HOST)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers.clone().__reduce_ex__(protocol)  # as files keep it

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:
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
    tensors = _tensors((*args, *kwargs.values()))
    device = next((t.device for t in tensors if isinstance(t, Pretend)), None)
    if device is None and torch.device(kwargs.get("device") or "cpu").type == "cuda":
        device = torch.device("cuda", index_of(kwargs["device"]))
    return _on_host(func, args, kwargs) if device is None else _on(device, func, args, kwargs)


def _crosses(tensor: Tensor, device: Any) -> bool:
    if device is None:
        return False
    return device == _HOST if isinstance(tensor, Pretend) else torch.device(device).type == "cuda"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Operations take tensors and lists of them; torch's own walk through any tree takes half the
    time of these tests."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _changed(kind: type[Tensor], change: Callable[[Any], Tensor], value: Any) -> Any:
    """`value` with each tensor of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_changed(kind, change, part) for part in value)
    return value


@functools.cache
def _arguments(func: Any) -> list[tuple[int, str, bool]]:
    """Position and name of each argument whose memory an operation touches, and whether it is
    written to."""
    if func.is_view or "empty" in func._schema.name:
        return []
    return [
        (
            position,
            argument.name,
            func.namespace == "c10d"
            or (argument.alias_info is not None and argument.alias_info.is_write),
        )
        for position, argument in enumerate(func._schema.arguments)
    ]


def _accesses(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """Each tensor whose memory an operation touches, and whether it is written to."""
    for position, name, writes in _arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        for tensor in _tensors(value):
            yield tensor, writes


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pins = kwargs.pop("pin_memory", None)
    is_sent = func.namespace == "c10d"  # see `_seen`
    for tensor, writes in _accesses(func, args, kwargs) if _PINNED and not is_sent else ():
        if memory := _pinned(tensor):
            memory.access(THREAD.actor, writes, tensor)
    result = func(*args, **kwargs)
    return _pin(result) if pins else result


def _on(device: torch.device, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    stream = current_stream(device)
    stream.launch()
    for tensor, writes in _accesses(func, args, kwargs):
        if isinstance(tensor, Pretend):
            tensor.memory.access(stream, writes, tensor.numbers)
        elif func in _INDEXED:
            wait(stream.known, f"{func} takes an index from the host")
        elif tensor.dim():
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got one of {device} and "
                "one of cpu"
            )
    by_mask = func in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
    if func in _READ_BY_HOST or by_mask:
        wait(stream.known, f"{func} on a device tensor")
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
            pretend.memory.access(stream, True, tensor)
        return pretend

    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    args = _changed(Pretend, inner, args)
    kwargs = {name: _changed(Pretend, inner, value) for name, value in kwargs.items()}
    return _changed(Tensor, wrapped, func(*args, **kwargs))


def _moved(source: Tensor, **kwargs: Any) -> Tensor:
    """`source.to(...)` between host and device."""
    blocking = not kwargs.pop("non_blocking", False)
    device, pins = torch.device(kwargs.pop("device")), kwargs.pop("pin_memory", False)
    inner = getattr(source, "numbers", source)
    empty = torch.empty_like(inner, dtype=kwargs.get("dtype") or inner.dtype)
    if device.type == "cpu":
        return _copied(_pin(empty) if pins else empty, source, blocking)
    return _copied(Pretend(empty, torch.device("cuda", index_of(device))), source, blocking)


def _copied(target: Tensor, source: Tensor, blocking: bool) -> Tensor:
    pretend = target if isinstance(target, Pretend) else source
    host = source if pretend is target else target
    stream = current_stream(pretend.device)
    stream.launch()
    source_inner, target_inner = (getattr(t, "numbers", t) for t in (source, target))
    target_inner.copy_(source_inner)
    pretend.memory.access(stream, pretend is target, pretend.numbers)
    pinned = _pinned(host)
    if pinned is not None:
        pinned.access(stream, host is target, host)
    if blocking or pinned is None:
        memory = "pinned" if pinned else "pageable"
        wait(stream.known, f"a {'blocking ' * blocking}copy, {memory} memory on the host")
    return target


# --- transfers, and what torch does by itself -----------------------------------------------------

_WIRES: dict[Any, Actor] = {}  # by direction, peer and group: transfers there are in order


class _Work:
    """A send or receive uses memory until somebody has waited for it: for memory of the host the
    thread, for that of a device the stream."""

    def __init__(self, work: Any, known: dict[Actor, int], device: torch.device | None) -> None:
        self._work, self._known, self._device = work, known, device

    def wait(self, *limit: Any) -> Any:
        done = self._work.wait(*limit)
        _waiting(self._device).learn(self._known)
        return done


def _waiting(device: torch.device | None) -> Actor:
    return THREAD.actor if device is None else current_stream(device)


def _seen(operation: Callable[..., Any], writes: bool) -> Callable[..., Any]:
    def posted(tensor: Tensor, peer: Any = None, group: Any = None, **how: Any) -> Any:
        wire = group if isinstance(group, tuple) else id(group)
        name = "a receive" if writes else "a send"
        actor = _WIRES.setdefault((writes, peer, wire), Actor(name))
        memory, numbers, device = _pinned(tensor), tensor, None
        if isinstance(tensor, Pretend):
            memory, numbers, device = tensor.memory, tensor.numbers, tensor.device
            current_stream(device).launch()
        actor.learn(_waiting(device).known)
        if memory is not None:
            memory.access(actor, writes, numbers)
        return _Work(operation(numbers, peer, group, **how), dict(actor.known), device)

    return posted


def _seen_in_group(operation: Callable[..., Any], writes: bool) -> Callable[..., Any]:
    """The same for a group's own `send` and `receive`: each of its tags is a wire."""

    def posted(group: Any, tensor: Tensor, rank: int, tag: int) -> Any:
        def start(numbers: Tensor, peer: Any, wire: Any) -> Any:
            return operation(group, numbers, peer, tag)

        return _seen(start, writes)(tensor, rank, (id(group), tag))

    return posted


def _over_gloo(new_group: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ranks=None, backend=None, **how: new_group(ranks, backend="gloo", **how)


def _applied(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`Module.to` gives parameters other memory; here they become of another class."""

    def to(module: nn.Module, function: Callable[..., Any], recurse: bool = True) -> nn.Module:
        for parameter in module.parameters(recurse):
            if not isinstance(parameter, Pretend):
                there = function(parameter.data)
                if isinstance(there, Pretend):
                    there = nn.Parameter(there, parameter.requires_grad)
                    there.__dict__.update(parameter.__dict__)
                    torch.utils.swap_tensors(parameter, there)
        return apply(module, function, recurse)

    return to


_GROUP = "_group_tensors_by_device_and_dtype"


def _grouped(group: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own code looks at devices here, and sees the host's."""

    def by_device(lists: Any, *args: Any) -> Any:
        first = next(tensor for tensor in lists[0] if tensor is not None)
        return {(first.device, key[1]): v for key, v in group(lists, *args).items()}

    return by_device


@contextmanager
def standin(device: int = 1) -> Iterator[list[Fault]]:
    """Inside, this thread computes on a device of that number. Gives the faults, as they come."""
    begin()
    cuda = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "stream": on_stream,
        "set_device": set_device,
        "current_device": index_of,
        "synchronize": synchronize,
        "device_count": lambda: device + 1,
        "get_device_capability": lambda _=None: (8, 0),
        "_lazy_init": lambda: None,
    }
    lifted, histc = torch._C._only_lift_cpu_tensors(), torch.histc
    patches = [
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(THREAD, device=device, computes=True),
        # of whole numbers, as a device takes them
        mock.patch.object(torch, "histc", lambda x, *how, **named: histc(x.float(), *how, **named)),
        mock.patch.object(dist, "isend", _seen(dist.isend, False)),
        mock.patch.object(dist, "irecv", _seen(dist.irecv, True)),
        mock.patch.object(HostGroup, "send", _seen_in_group(HostGroup.send, False)),
        mock.patch.object(HostGroup, "receive", _seen_in_group(HostGroup.receive, True)),
        mock.patch.object(dist, "new_group", _over_gloo(dist.new_group)),
        mock.patch.object(nn.Module, "_apply", _applied(nn.Module._apply)),
        mock.patch.object(torch._C, _GROUP, _grouped(getattr(torch._C, _GROUP))),
        torch.autograd.set_multithreading_enabled(False),
        _Mode(),
    ]
    with ExitStack() as stack:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes by here
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.callback(_PINNED.clear)
        for patch in patches:
            stack.enter_context(patch)
        yield FAULTS
