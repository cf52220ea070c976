"""Parts of DeepSpeed that a local pipeline replaces with its own."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from io import BytesIO
from typing import Any
from weakref import WeakSet

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

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


# --- gradients that are not finite --------------------------------------------------------------


def gradient_of(parameter: Tensor) -> Tensor | None:
    """What has been accumulated in this step, before replicas average: DeepSpeed's bf16 optimizer
    and its ZeRO keep a sum of their own."""
    for name in ("_hp_grad", "grad_accum", "grad"):
        gradient = getattr(parameter, name, None)
        if gradient is not None:
            return gradient.coalesce().values() if gradient.is_sparse else gradient
    return None


def always_check_overflow(optimizer: Any) -> None:
    """`bf16.check_grad_overflow: false` would let a gradient pass that is not finite."""
    if hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True


def spoil_gradients(optimizer: Any) -> None:
    """Make DeepSpeed's bf16 or ZeRO optimizer refuse the coming step by its own overflow check: it
    clears its gradients then, and leaves weights and moments alone."""
    averaged = getattr(optimizer, "averaged_gradients", {}).values()
    flat = getattr(optimizer, "fp32_groups_gradients_flat", [])
    for gradient in [g for group in averaged for g in group or () if g is not None] + list(flat):
        gradient.fill_(torch.nan)


# what DeepSpeed itself puts into the files that `client_state` goes to
RESERVED = (
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
)


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's checkpoint files, read without running what is in them."""

    def save(self, state_dict: Any, path: str) -> None:
        with open(path, "wb") as file:  # torch's own writer does not say why a disk takes no more
            torch.save(state_dict, file, _use_new_zipfile_serialization=self.zipfile_serialization)

    def load(self, path: str, map_location: Any = None) -> Any:
        try:
            return _read(path, map_location)
        except Exception as error:  # a damaged file can fail in many ways
            raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error

    def look(self, path: str) -> Any:
        """As `load`, with tensors that are read from the disk when somebody looks at them."""
        try:
            mapped = zipfile.is_zipfile(path)  # the only kind that can be mapped
            return _read(path, "cpu", mmap=mapped)
        except Exception as error:  # a damaged file can fail in many ways
            raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error


def _read(source: Any, map_location: Any = None, **how: Any) -> Any:
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        return torch.load(source, map_location=map_location, weights_only=True, **how)


def unloadable(value: Any, name: str) -> str | None:
    """What in `value`, called `name`, could be saved but not be read again; None: nothing."""
    buffer = BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        _read(buffer)
    except Exception:  # there are many ways
        parts: list[tuple[Any, str]] = []
        if isinstance(value, dict):
            parts = [(key, f"the key {key!r} of {name}") for key in value]
            parts += [(part, f"{name}[{key!r}]") for key, part in value.items()]
        elif isinstance(value, list | tuple | set):
            parts = [(part, f"{name}[{number}]") for number, part in enumerate(value)]
        found = next(filter(None, (unloadable(part, where) for part, where in parts)), None)
        return found or f"{name} is a {type(value).__module__}.{type(value).__qualname__}"
    return None


def _reason(error: Exception) -> str:
    """The telling line of torch's long message about a file it does not trust."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next(
        (line.strip().partition(". Please use")[0] for line in lines if "Unsupported" in line),
        lines[0],
    )
