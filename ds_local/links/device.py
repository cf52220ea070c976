"""Between the host and a device: there without waiting for what the device computes, back with one
wait for all; and how much memory is held there."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; itself if it is there.

    A copy from memory that is not pinned makes the host wait, so on a GPU it goes by way of pinned
    memory. Torch gives that to nobody else before the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensors: Sequence[Tensor]) -> Tensor:
    """The numbers of tensors one after another, of the least dtype that holds them all, [N]. The
    host waits for their device once.

    Args:
        tensors: one or more, some perhaps on the host.
    """
    device = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
    flat = torch.empty(
        sum(tensor.numel() for tensor in tensors),
        dtype=reduce(torch.promote_types, (tensor.dtype for tensor in tensors)),
        pin_memory=device is not None,
    )
    sizes = [tensor.numel() for tensor in tensors]
    for place, tensor in zip(flat.split(sizes), tensors, strict=True):
        place.copy_(tensor.detach().flatten(), non_blocking=True)
    if device is not None:
        torch.cuda.current_stream(device).synchronize()
    return flat


def peak_memory(device: torch.device) -> int:
    """The most bytes that this rank has held so far: of torch on a GPU, else of the process. The
    host does not wait."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
