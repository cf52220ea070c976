"""Joining and leaving the process group: with a limit for every wait in it, and the ranks' notices
beside it."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist
from torch.distributed import distributed_c10d

from ds_local.cluster.assembly import Assembly
from ds_local.cluster.start_check import LIMIT_SECONDS
from ds_local.cluster.surroundings import own_address
from ds_local.engine.deepspeed_seam import ENGINES
from ds_local.links import notices
from ds_local.links.agreement import gather
from ds_local.links.failures import Failures, meeting
from ds_local.links.notices import Notices
from ds_local.links.staging import ranks_here
from ds_local.links.store_guard import store_guard

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LIMITS = {  # torch's own, for groups made without one
    name: getattr(distributed_c10d, name)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout")
}


def start_processes(
    start_seconds: float = LIMIT_SECONDS, wait_seconds: float = LIMIT_SECONDS
) -> None:
    """`deepspeed.init_distributed` where the caller has not done it, and what it lacks.

    All ranks call it, as often as they like.

    Args:
        start_seconds: longest wait for all ranks to be here.
        wait_seconds: longest wait in any collective from now on, those of DeepSpeed included.

    Raises:
        ClusterError: naming the ranks that do not come.
        TransportError: naming the rank that was lost on the way.
    """
    launched = all(name in os.environ for name in _LAUNCHED)
    assembly = None
    if not dist.is_initialized() and launched and int(os.environ["WORLD_SIZE"]) > 1:
        assembly = Assembly(start_seconds)
        _begin(assembly.rank, lambda card: assembly.exchange("notices", card))
    limit_waits(wait_seconds)
    limit = timedelta(seconds=wait_seconds)
    what = "the start of the process group"
    with meeting(what), store_guard(what, wait_seconds):
        backend = group_backend()
        if assembly is not None and backend in ("gloo", "nccl"):
            # over the store that there is: torch's own way to a second one waits for a rank 0 that
            # hangs without end
            store, ranks = assembly.store_of_group(), assembly.world_size
            dist.init_process_group(
                backend, store=store, rank=assembly.rank, world_size=ranks, timeout=limit
            )
        deepspeed.init_distributed(timeout=limit)
        if dist.get_world_size() > 1 and notices.current() is None:
            _begin(dist.get_rank(), gather)


def group_backend() -> str:
    """The backend of the process group, on the device that LOCAL_RANK names.

    Where this machine has more ranks than devices they are dealt out, and gloo it is: NCCL wants a
    device for each rank. Then LOCAL_RANK is the number of the shared device, for DeepSpeed too.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return accelerator.communication_backend_name()
    devices, local_rank = accelerator.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    shared = 0 < devices < ranks_here()
    if shared:
        local_rank %= devices
        os.environ["LOCAL_RANK"] = str(local_rank)
    accelerator.set_device(local_rank)
    return "gloo" if shared else accelerator.communication_backend_name()


def _begin(rank: int, exchange: Any) -> None:
    own = Notices(rank, own_address())
    Failures(own)  # hears from the start what failed
    own.meet(exchange(own.card))
    notices.begin(own)


def limit_waits(seconds: float) -> None:
    """No wait in a process group takes longer: in those there are, and those made from now on."""
    limit = timedelta(seconds=seconds)
    for name in _LIMITS:
        setattr(distributed_c10d, name, limit)
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(limit, group)


def end_processes() -> None:
    """Leave the process group, so that this process may join another one."""
    for engine in list(ENGINES):
        with suppress(RuntimeError):  # a neighbour may be gone
            # hooks of DeepSpeed's bf16 and ZeRO optimizers would keep it, and its links' threads,
            # for ever
            engine.destroy()
    ENGINES.clear()
    notices.end()
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    Assembly.release()
    for name, limit in _LIMITS.items():
        setattr(distributed_c10d, name, limit)
