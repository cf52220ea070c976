"""How much autograd keeps alive for the backward passes, counted exactly, and how far the process
grew meanwhile."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Saved:
    """Stands for a tensor that autograd saved; counts it out when autograd drops it."""

    __slots__ = ("key", "owner", "tensor")

    def __init__(self, owner: LiveTensors, tensor: Tensor) -> None:
        self.owner, self.tensor = owner, tensor
        self.key = owner._count_in(tensor)

    def __del__(self) -> None:
        self.owner._count_out(self.key)


class LiveTensors:
    """A context in which saved tensors are counted, each storage once, parameters not at all.

    `peak` is in bytes. It depends on the model and the order of the work alone, not on device or
    allocator.

    Args:
        watch_process: also measure `process_growth`, the highest resident memory less that at the
            start (bytes; None where the system does not let a process ask).
    """

    def __init__(self, watch_process: bool = False) -> None:
        self.now = self.peak = 0
        self.process_growth: int | None = None
        self._storages: dict[int, list[int]] = {}  # address -> [bytes, times saved]
        self._watch_process = watch_process
        self._before: int | None = None
        self._hooks: Any = None

    def __enter__(self) -> LiveTensors:
        if self._watch_process:
            self._before = _forget_highest()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            self._pack, lambda saved: getattr(saved, "tensor", saved)
        )
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        if self._before is not None:
            self.process_growth = _status("VmHWM") - self._before

    def _pack(self, tensor: Tensor) -> Any:
        return (
            tensor
            if isinstance(tensor, torch.nn.Parameter) or _is_weight(tensor)
            else _Saved(self, tensor)
        )

    def _count_in(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        entry = self._storages.setdefault(key, [storage.nbytes(), 0])
        if not entry[1]:
            self.now += entry[0]
            self.peak = max(self.peak, self.now)
        entry[1] += 1
        return key

    def _count_out(self, key: int) -> None:
        entry = self._storages[key]
        entry[1] -= 1
        if not entry[1]:
            self.now -= entry[0]
            del self._storages[key]


def _is_weight(tensor: Tensor) -> bool:
    """A view of a parameter, such as the transposed weight of a linear layer."""
    return isinstance(tensor._base, torch.nn.Parameter)


def _forget_highest() -> int | None:
    """Resident bytes now, after resetting the highest so far; None where that is not allowed."""
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # free memory that the process still holds would hide what comes
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) * 1024
