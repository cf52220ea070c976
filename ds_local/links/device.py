"""From the host to a device without waiting for what the device computes."""

from __future__ import annotations

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
