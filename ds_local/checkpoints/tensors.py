"""Are these the tensors of this module? Asked before any of them is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.errors import CheckpointError


def check_tensors(
    found: Any,
    module: nn.Module,
    path: str,
    strict: bool = True,
    shape_of: Callable[[Tensor], torch.Size] = lambda tensor: tensor.shape,
) -> None:
    """Compare a state dict that was read from `path` with a module, by names and shapes.

    Args:
        strict: no name may be missing or unknown.
        shape_of: the shape that a tensor of the module should have.

    Raises:
        CheckpointError: naming the tensors that do not fit.
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds no tensors by name; use another checkpoint")
    wanted = module.state_dict(keep_vars=True)
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if strict and (missing or unknown):
        raise CheckpointError(
            f"{path} is of another model: missing are {_listed(missing)}, unknown "
            f"{_listed(unknown)}; give the same model, or take what is there with "
            "load_module_strict=False"
        )
    for name, own in wanted.items():
        theirs = found.get(name, own)
        if not isinstance(own, Tensor) or theirs is own:
            continue
        if not isinstance(theirs, Tensor) or theirs.shape != shape_of(own):
            shape = list(theirs.shape) if isinstance(theirs, Tensor) else "no tensor"
            raise CheckpointError(
                f"{path} is of another model: {name} is {shape} there, {list(shape_of(own))} in "
                "this run; give the same model"
            )


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
