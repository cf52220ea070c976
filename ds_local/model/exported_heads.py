"""Auxiliary heads in a folder that we exported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ds_local.config.sections import HeadConfig
from ds_local.errors import WeightsError, first_line
from ds_local.model import families
from ds_local.model.pretrained import HEADS_FILE, Weights


def load_head(
    head: nn.Module, segment: int, how: HeadConfig, parts: Sequence[int], weights: Weights
) -> None:
    """Fill what an auxiliary head has of the model's own: copied blocks, a shared readout, norm and
    readout with init "model".

    Heads that were exported with the model, cut at the same layers and made in the same way, are
    taken whole instead.

    Raises:
        WeightsError: when a tensor is missing, damaged or of another shape.
    """
    state = head.state_dict()
    if _exported_with(weights.folder, parts):
        _read_exported(state, segment, weights.folder)
        return
    for name, wanted in _of_the_model(weights.config, state, segment, how, parts).items():
        weights.read_into(state[name], wanted)


def _of_the_model(
    config: Any, state: Mapping[str, Tensor], segment: int, how: HeadConfig, parts: Sequence[int]
) -> dict[str, str]:
    """name in a head -> name in the model, of what the head starts from."""
    family = families.family_of(config)
    names = {}
    for name in state:
        part, _, rest = name.partition(".")
        if part == "blocks" and how.blocks_from != "new":
            index, _, rest = rest.partition(".block.")
            names[name] = f"{family.blocks}.{parts[segment + 1] - 1 + int(index)}.{rest}"
        elif part == "norm" and how.init == "model":
            names[name] = f"{family.norm}.{rest}"
        elif part == "readout" and (how.init == "model" or how.readout == "shared"):
            names[name] = f"{family.readout}.{rest}"
    return names


def _exported_with(folder: Path, parts: Sequence[int]) -> bool:
    """Are there heads of a model cut at the same layers?"""
    if not (folder / HEADS_FILE).is_file():
        return False
    with _open_heads(folder) as tensors:
        told = (tensors.metadata() or {}).get("segment_parts", "null")
    return told == json.dumps(list(parts))


def _read_exported(state: Mapping[str, Tensor], segment: int, folder: Path) -> None:
    prefix = f"segment_{segment}."
    with _open_heads(folder) as tensors, torch.no_grad():
        found = {name.removeprefix(prefix) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
        if found != set(state):
            raise WeightsError(
                f"{folder / HEADS_FILE}: the head of segment {segment} has "
                f"{sorted(found - set(state))} too much and lacks {sorted(set(state) - found)}; "
                "use the head options it was trained with, or remove the file"
            )
        for name, target in state.items():
            tensor = tensors.get_tensor(prefix + name)
            if tensor.shape != target.shape:
                raise WeightsError(
                    f"{folder / HEADS_FILE}: tensor {prefix}{name} has shape {list(tensor.shape)}, "
                    f"this run needs {list(target.shape)}; use the head options it was trained "
                    "with, or remove the file"
                )
            target.copy_(tensor)


def _open_heads(folder: Path) -> Any:
    try:
        return safe_open(folder / HEADS_FILE, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot read {folder / HEADS_FILE}: {first_line(error)}") from error
