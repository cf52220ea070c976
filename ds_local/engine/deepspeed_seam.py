"""Parts of DeepSpeed that a local pipeline replaces with its own."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import deepspeed
import deepspeed.comm.torch
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from torch.distributed import distributed_c10d

from ds_local.cluster.start_check import LIMIT_SECONDS, Assembly
from ds_local.cluster.surroundings import own_address
from ds_local.errors import CheckpointError
from ds_local.links import notices
from ds_local.links.failures import meeting
from ds_local.links.notices import Notices


# Only inference uses DeepSpeed's shared-memory op for CPUs, yet every start loads it: it is compiled
# first (a start killed meanwhile leaves a lock on which all later ones wait in silence), and each run
# leaves 64 MB per rank behind in /dev/shm.
deepspeed.comm.torch.build_shm_op = lambda: None

_LIMITS = {
    name: getattr(distributed_c10d, name)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout")
}
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_processes(
    start_seconds: float = LIMIT_SECONDS, wait_seconds: float = LIMIT_SECONDS
) -> None:
    """`deepspeed.init_distributed`, with a limit for every wait, and the ranks' notices.

    Where the caller has made the process group, what is missing is added. A collective call.

    Args:
        start_seconds: longest wait for all ranks to be here.
        wait_seconds: longest wait in any collective from now on, those of DeepSpeed included.

    Raises:
        ClusterError: naming the ranks that do not come.
        TransportError: naming the rank that was lost on the way.
    """
    limit_waits(wait_seconds)
    if not torch.distributed.is_initialized():
        launched = all(name in os.environ for name in _LAUNCHED)
        if launched and int(os.environ["WORLD_SIZE"]) > 1:
            store = Assembly(start_seconds)
            own = Notices(store.rank, own_address())
            own.meet(store.exchange("notices", own.card))
            notices.begin(own)
    with meeting("the start of the process group"):
        deepspeed.init_distributed(timeout=timedelta(seconds=wait_seconds))
        world_size = torch.distributed.get_world_size()
        if world_size > 1 and notices.current() is None:
            own = Notices(torch.distributed.get_rank(), own_address())
            cards: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(cards, own.card)
            own.meet(cards)
            notices.begin(own)


def limit_waits(seconds: float) -> None:
    """No wait of a process group takes longer: of those there are, and of those made from now
    on."""
    limit = timedelta(seconds=seconds)
    for name in _LIMITS:
        setattr(distributed_c10d, name, limit)
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(limit, group)


ENGINES: WeakSet[Any] = WeakSet()  # of this process


def end_processes() -> None:
    """Leave the process group, so that this process may join another one."""
    for engine in list(ENGINES):
        with suppress(RuntimeError):  # a neighbour may be gone
            engine.destroy()  # hooks of DeepSpeed's bf16 and ZeRO optimizers would keep it, and its links' threads, for ever
    ENGINES.clear()
    notices.end()
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    Assembly.release()
    for name, limit in _LIMITS.items():
        setattr(distributed_c10d, name, limit)


# what DeepSpeed pickles into its optimizer files besides tensors and plain data
_PLAIN_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


class StageLocal:
    """Stands in for the process grid where DeepSpeed would reduce over all stages: there this stage
    is the whole model."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def get_model_parallel_group(self) -> Any:
        return self._grid.get_slice_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self._grid.get_slice_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return self._grid.get_slice_parallel_rank()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's checkpoint files, read without running what is in them."""

    def load(self, path: str, map_location: Any = None) -> Any:
        try:
            with torch.serialization.safe_globals(_PLAIN_CLASSES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a damaged file can fail in many ways
            raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The telling line of torch's long message about a file it does not trust."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next(
        (line.strip().partition(". Please use")[0] for line in lines if "Unsupported" in line),
        lines[0],
    )
