"""Process groups whose messages go through the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import distributed as dist


def host_group(ranks: Sequence[int]) -> Any:
    """A gloo group of some ranks. A collective call of all.

    Where the world is bound to a device, as DeepSpeed binds it for NCCL, torch wants ranks outside
    a new group to take part in splitting NCCL's communicator, which the members of a gloo group do
    not: with three ranks or more that would wait for ever. So the world is not bound meanwhile.
    """
    world: Any = dist.group.WORLD
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        return dist.new_group(list(ranks), backend="gloo")
    finally:
        world.bound_device_id = bound
