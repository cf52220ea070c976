"""Which models can be cut into layers: the config of one, read and proved before it is used."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig

from ds_local.errors import ConfigError, UnsupportedModel
from ds_local.model.anatomy import (
    UNLIMITED,
    config_dict,
    config_json,
    family_of,
    frame_of,
    hf_names,
    learned_positions,
    num_blocks,
    num_positions,
    skeleton,
    tensor_names,
)
from ds_local.model.config_file import read_config, reason
from ds_local.model.family_check import check_family

__all__ = [
    "UNLIMITED",
    "config_dict",
    "family_of",
    "hf_names",
    "learned_positions",
    "load_model_config",
    "num_blocks",
    "num_positions",
    "skeleton",
    "tensor_names",
]


def load_model_config(source: str | Path | dict[str, Any] | PretrainedConfig) -> PretrainedConfig:
    """A Hugging Face config from a JSON file, a model folder, a hub name, a dict or a config.

    Raises:
        UnsupportedModel: when it cannot be read, or its model cannot be cut into layers that
            compute the same; the message says why.
        ConfigError: for a key that only resembles a real one, and numbers that do not fit.
    """
    config, where = read_config(source)
    config.dtype = None  # that of the saved weights; in training the DeepSpeed config decides
    if (key := config_json(config)) not in _proved:
        _prove(config, where)
        _proved.add(key)
    return config


_proved: set[str] = set()  # configs that this process has tried out


def _prove(config: PretrainedConfig, where: str) -> None:
    try:
        try:
            _run_one_block(config)
        except UnsupportedModel:
            raise
        except Exception as error:  # whatever a model says about its numbers
            key = _key_at_fault(config)
            what = f"no {config.model_type} can be made of it{f' with this {key}' if key else ''}"
            raise ConfigError(f"{where}: {what}: {reason(error, config)}") from error
        check_family(config)
    except UnsupportedModel as error:
        what = f"a {config.model_type} cannot be trained in parts: {error}"
        raise UnsupportedModel(f"{where}: {what}; docs/models.md lists what can") from error


def _key_at_fault(config: PretrainedConfig) -> str | None:
    """The one key without which, at its default, a block runs; None where no single one is to
    blame."""
    for key, value in config.to_diff_dict().items():
        usual = getattr(type(config)(), key, value)
        if key in ("model_type", "transformers_version") or usual == value:
            continue
        changed = copy.deepcopy(config)
        setattr(changed, key, usual)
        with suppress(Exception):
            _run_one_block(changed)
            return f"{key} ({value!r})"
    return None


def _run_one_block(config: PretrainedConfig) -> None:
    """Without storage: shapes that do not fit are found here."""
    model, family = skeleton(config), family_of(config)
    hidden_BTD = torch.empty(1, min(2, num_positions(config)), config.hidden_size)
    call = frame_of(config).calls_of(hidden_BTD, {})[0]
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to("meta"), (call.args, call.kwargs)
    )
    block = model.get_submodule(f"{family.blocks}.0")
    if any(p.dim() > 2 for p in block.parameters()):
        return  # experts, which tokens choose by their values
    with torch.no_grad():
        block(hidden_BTD.to("meta"), *args, **kwargs)
