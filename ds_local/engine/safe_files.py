"""DeepSpeed's checkpoint files, read without running what is in them."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_local.checkpoints.by_name import NAMES
from ds_local.errors import CheckpointError

# what DeepSpeed pickles into its optimizer files besides tensors and plain data
_PLAIN_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]

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
    "checkpoint_parallel_dimensions",
    NAMES,
)


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's checkpoint files, read without running what is in them."""

    maps = False  # does `load` leave tensors on the disk until somebody reads them?

    def save(self, state_dict: Any, path: str) -> None:
        with open(path, "wb") as file:  # torch's own writer does not say why a disk takes no more
            torch.save(state_dict, file, _use_new_zipfile_serialization=self.zipfile_serialization)

    def load(self, path: str, map_location: Any = None) -> Any:
        return _with_count(self._load(path, map_location), Path(path))

    def _load(self, path: str, map_location: Any) -> Any:
        if self.maps:
            return self.look(path)
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


def _with_count(state: Any, path: Path) -> Any:
    """DeepSpeed compares the count of stages in a file with the files that are there. In gathered
    files it is that of their unit; ds_local.json says which files belong to a checkpoint."""
    if isinstance(state, dict) and "mp_world_size" in state:
        state["mp_world_size"] = len(list(path.parent.glob("mp_rank_*_model_states.pt")))
    return state


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
        (
            line.strip().partition(". Please use")[0]
            for line in lines
            if "unsupported" in line.lower()
        ),
        lines[0],
    )
