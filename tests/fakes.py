"""torch's fake tensors on a pretended "cuda:0": what real code computes has a shape, a dtype and a
place there, and no numbers.

An operation on tensors of two devices raises, as on a GPU, and so does what reads a number. Nothing
is computed, so sizes may be those of real models. What runs in which order is the stand-in's
(`standin.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_local.links import codecs
from ds_local.model import blocks

DEVICE = torch.device("cuda", 0)

_make = Tensor._make_subclass


def _made(kind: type[Tensor], tensor: Tensor, learns: bool = False, **how: Any) -> Tensor:
    """Only Python sees the pretended device. Torch's own code would look for its driver; it sees a
    tensor of the meta device."""
    hidden = torch.device(how.get("device_for_backend_keys") or "cpu") == DEVICE
    return _make(kind, tensor, learns, **({} if hidden else how))


class _Mode(FakeTensorMode):
    """What torch's own code makes beside such a tensor is on the device, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = DEVICE
        return super().__torch_dispatch__(func, types, args, kwargs)


def _pinned(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin a tensor of {tensor.device}")
    return tensor


@contextmanager
def faked() -> Iterator[None]:
    """Inside, tensors are fake; those that were there before, when they meet a fake one."""
    kept = (codecs._bits, codecs._start, blocks._context_of)
    with ExitStack() as stack:
        for one in kept:
            one.cache_clear()
            stack.callback(one.cache_clear)
        patches = {"_make_subclass": staticmethod(_made), "pin_memory": _pinned}
        stack.enter_context(mock.patch.multiple(Tensor, **patches))
        stack.enter_context(_Mode(allow_non_fake_inputs=True))
        yield


def there(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device."""
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=DEVICE)


def moved(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A module of real weights on the device, as `to` moves it: weights and buffers alone."""
    for one in module.modules():
        for name, weight in one._parameters.items():
            if weight is not None:
                one._parameters[name] = nn.Parameter(there(weight, dtype), weight.requires_grad)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                floats = buffer.is_floating_point()
                one._buffers[name] = there(buffer, dtype if floats else None)
    return module
