"""The model families that can be cut into layers, and what their configs say."""

from __future__ import annotations

import copy
import functools
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ds_local.errors import ConfigError
from ds_local.model.config_file import read_config, reason


@dataclass(frozen=True)
class Family:
    """Where a family of Hugging Face models keeps its parts (dotted names below the causal LM)."""

    tokens: str
    blocks: str
    norm: str
    readout: str = "lm_head"
    positions: str | None = None  # learned position embedding
    dropout: str | None = None  # after the embeddings
    rotary: str | None = None


_LLAMA = Family("model.embed_tokens", "model.layers", "model.norm", rotary="model.rotary_emb")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "transformer.wte",
        "transformer.h",
        "transformer.ln_f",
        positions="transformer.wpe",
        dropout="transformer.drop",
    ),
    "gpt_neox": Family(  # Pythia too
        "gpt_neox.embed_in",
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        dropout="gpt_neox.emb_dropout",
        rotary="gpt_neox.rotary_emb",
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2"), _LLAMA),
}


def load_model_config(source: str | Path | dict[str, Any] | PretrainedConfig) -> PretrainedConfig:
    """A Hugging Face config from a JSON file, a model folder, a hub name, a dict or a config.

    Raises:
        UnsupportedModel: when it cannot be read or its family is not supported; the message lists
            the families.
        ConfigError: for a key that only resembles a real one, and numbers that do not fit.
    """
    config, where = read_config(source, FAMILIES)
    config.dtype = None  # that of the saved weights; in training the DeepSpeed config decides
    try:
        _run_one_block(config)
    except Exception as error:  # whatever a model says about its numbers
        key = _key_at_fault(config)
        what = f"no {config.model_type} can be made of it{f' with this {key}' if key else ''}"
        raise ConfigError(f"{where}: {what}: {reason(error, config)}") from error
    return config


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
    hidden_BTD = torch.empty(1, 2, config.hidden_size, device="meta")
    positions = torch.zeros(1, 2, dtype=torch.long, device="meta")
    kwargs: dict[str, Any] = {"attention_mask": None, "position_ids": positions}
    with torch.no_grad():
        if family.rotary is not None:
            kwargs["position_embeddings"] = model.get_submodule(family.rotary)(
                hidden_BTD, positions
            )
        model.get_submodule(f"{family.blocks}.0")(hidden_BTD, use_cache=False, **kwargs)


@functools.lru_cache(maxsize=4)
def _skeleton_of(config_json: str) -> PreTrainedModel:
    config = AutoConfig.for_model(**json.loads(config_json))
    with init_empty_weights(include_buffers=True):
        return AutoModelForCausalLM.from_config(config)


def config_dict(config: PretrainedConfig) -> dict[str, Any]:
    """The config as plain JSON values, without private fields, which must never be taken from a
    file."""
    return {
        k: v
        for k, v in json.loads(config.to_json_string(use_diff=False)).items()
        if not k.startswith("_") and k != "loss_type"
    }


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model without storage, for its structure; shared, so never changed."""
    return _skeleton_of(json.dumps(config_dict(config), sort_keys=True))


def family_of(config: PretrainedConfig) -> Family:
    return FAMILIES[config.model_type]


def hf_names(config: PretrainedConfig, layer: int) -> dict[str, str]:
    """Where the parts of pipeline layer `layer` are in the Hugging Face model: name in the layer ->
    name in the model."""
    family = family_of(config)
    if layer == 0:
        return {"tokens": family.tokens} | (
            {"positions": family.positions} if family.positions else {}
        )
    if layer <= num_blocks(config):
        return {"block": f"{family.blocks}.{layer - 1}"}
    return {"norm": family.norm, "readout": family.readout}


def tensor_names(config: PretrainedConfig, layer: int) -> dict[str, str]:
    """Every saved tensor of pipeline layer `layer`: name in the layer -> name in the Hugging Face
    model."""
    whole = skeleton(config).state_dict()
    return {
        part + name.removeprefix(prefix): name
        for part, prefix in hf_names(config, layer).items()
        for name in whole
        if name.startswith(prefix + ".")
    }


def attention_of(config: PretrainedConfig, index: int) -> str:
    """ "full_attention" or "sliding_attention" of block `index`."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return layer_types[index]
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def num_blocks(config: PretrainedConfig) -> int:
    return len(skeleton(config).get_submodule(family_of(config).blocks))


def num_positions(config: PretrainedConfig) -> int:
    """Longest sequence the model takes."""
    return config.max_position_embeddings


def learned_positions(config: PretrainedConfig) -> int | None:
    """How many positions the model has an embedding of, None where it computes them."""
    return num_positions(config) if family_of(config).positions else None
