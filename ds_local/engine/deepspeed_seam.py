"""Parts of DeepSpeed that a local pipeline replaces with its own."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from weakref import WeakSet

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_local.errors import CheckpointError


def start_processes() -> None:
    """`deepspeed.init_distributed`, without DeepSpeed's shared-memory op for CPUs.

    Only inference uses that op, yet every start loads it: it is compiled first (a start killed
    meanwhile leaves a lock on which all later ones wait in silence), and each run leaves 64 MB per
    rank behind in /dev/shm.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


ENGINES: WeakSet[Any] = WeakSet()  # of this process


def end_processes() -> None:
    """Leave the process group, so that this process may join another one."""
    for engine in list(ENGINES):
        with suppress(RuntimeError):  # a neighbour may be gone
            engine.destroy()  # hooks of DeepSpeed's bf16 and ZeRO optimizers would keep it, and its links' threads, for ever
    ENGINES.clear()
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


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
