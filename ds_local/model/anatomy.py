"""Where a causal language model of Hugging Face's keeps its parts, found out by running its code.

Any model is taken whose code is: something that makes one hidden state, a list of blocks that run
once each, a norm, a linear readout.
"""

from __future__ import annotations

import functools
import inspect
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ds_local.errors import UnsupportedModel
from ds_local.model.config_file import decoded, last_line
from ds_local.model.frames import OUTPUTS, Frame, Trace

UNLIMITED = 1 << 20  # tokens in a sequence, where a model sets no limit


@dataclass(frozen=True)
class Family:
    """Where a model keeps its parts (dotted names below the causal LM)."""

    embedding: Mapping[str, str]  # part -> name, of all that has weights before the blocks
    blocks: str
    norm: str | None  # None: the readout takes the last block's output as it is
    readout: str
    outputs: int  # what a block gives, one of `frames.OUTPUTS`
    needs_masks: bool  # to make the first hidden state

    @property
    def tokens(self) -> str:
        return self.embedding["tokens"]


@functools.lru_cache(maxsize=16)
def _skeleton_of(config_json: str) -> PreTrainedModel:
    config = config_of(config_json)
    with init_empty_weights(include_buffers=True):
        return AutoModelForCausalLM.from_config(config).eval()


def config_dict(config: PretrainedConfig) -> dict[str, Any]:
    """The config as plain JSON values, without private fields, which must never be taken from a
    file."""
    return _public(config_json(config))


def config_json(config: PretrainedConfig) -> str:
    """A key for what is kept of a config."""
    return _json_of(pickle.dumps(config))


@functools.lru_cache(maxsize=64)
def _json_of(pickled: bytes) -> str:
    """It is asked for some eighty times a start; the library's way costs ten times as much as
    pickling."""
    text: str = pickle.loads(pickled).to_json_string(use_diff=False)
    return text


def _public(config_json: str) -> dict[str, Any]:
    return {
        key: value
        for key, value in json.loads(config_json).items()
        if not key.startswith("_") and key != "loss_type"
    }


def config_of(config_json: str) -> PretrainedConfig:
    """The config again."""
    return AutoConfig.for_model(**decoded(_public(config_json)))


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model without storage, for its structure; shared, so never changed."""
    return _skeleton_of(config_json(config))


# --- the parts of a model -------------------------------------------------------------------------


def family_of(config: PretrainedConfig) -> Family:
    """Where a model of this config keeps its parts.

    Raises:
        UnsupportedModel: when it is built otherwise than models that can be cut.
    """
    return _family_of(config_json(config))


@functools.lru_cache(maxsize=16)
def _family_of(config_json: str) -> Family:
    model = _skeleton_of(config_json)
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel("its code takes no hidden states (inputs_embeds) in place of ids")
    names = {id(module): name for name, module in model.named_modules()}
    tokens, readout = model.get_input_embeddings(), model.get_output_embeddings()
    if id(tokens) not in names or not isinstance(readout, nn.Linear):
        raise UnsupportedModel("it has no token embedding or no linear readout")
    blocks = _blocks_of(model)
    trace, outputs = _trace(model, blocks)
    masks = _needs_masks(model, blocks, outputs)
    *norms, last = trace.after or [""]
    if last != names[id(readout)] or len(norms) > 1:
        raise UnsupportedModel(
            f"between its blocks and its logits it runs {', '.join(trace.after) or 'nothing'}, "
            "which is more than a norm and a readout"
        )
    embedding = _embedding(model, trace.before, names[id(tokens)])
    family = Family(embedding, blocks, norms[0] if norms else None, last, outputs, masks)
    _check_all_found(model, family)
    return family


def _blocks_of(model: PreTrainedModel) -> str:
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise UnsupportedModel("its blocks are not one list of num_hidden_layers")
    return max(lists)[1]


def _trace(model: PreTrainedModel, blocks: str) -> tuple[Trace, int]:
    """What runs around the blocks, and what a block must give for that."""
    failures: list[Exception] = []
    for outputs in OUTPUTS:
        try:
            trace = Frame(model, blocks, outputs).trace()
            if len(trace.hidden) != 3:
                raise UnsupportedModel("its hidden state is more than one vector a token")
            Frame(model, blocks, outputs).calls_of(torch.zeros(trace.hidden), {})
            return trace, outputs
        except Exception as error:  # of the library's code, which got something else than it takes
            failures.append(error)
    first = next((e for e in failures if isinstance(e, UnsupportedModel)), failures[0])
    if isinstance(first, UnsupportedModel):
        raise first
    raise UnsupportedModel(f"its code does not run without blocks: {last_line(first)}") from first


def _needs_masks(model: PreTrainedModel, blocks: str, outputs: int) -> bool:
    """Does its code look into the masks itself?"""
    try:
        Frame(model, blocks, outputs, masks=False).trace()
    except Exception:  # of the library's code, which got no mask
        return True
    return False


def _embedding(model: PreTrainedModel, before: list[str], tokens: str) -> dict[str, str]:
    saved = model.state_dict().keys()
    parts = {"tokens": tokens}
    for outer in before:
        for inner, module in model.get_submodule(outer).named_modules():
            name = ".".join(filter(None, (outer, inner)))
            if name == tokens or not any(key.rpartition(".")[0] == name for key in saved):
                continue
            part = name.rpartition(".")[2]
            if isinstance(module, nn.Embedding) and "positions" not in parts:
                part = "positions"
            parts[part if part not in parts else name.replace(".", "_")] = name
    return parts


def _check_all_found(model: PreTrainedModel, family: Family) -> None:
    places = [family.blocks, family.readout, *family.embedding.values()]
    if family.norm:
        places.append(family.norm)
    for name in model.state_dict():
        if not any(name.startswith(place + ".") for place in places):
            raise UnsupportedModel(f"it keeps {name} outside its embedding, blocks and readout")
    if family.norm in family.embedding.values():
        raise UnsupportedModel(f"it uses {family.norm} before its blocks and after them")


def frame_of(config: PretrainedConfig, own: Mapping[str, nn.Module] | None = None) -> Frame:
    """The code around the blocks; with modules of one's own, for the first hidden state alone."""
    family = family_of(config)
    masks = own is None or family.needs_masks
    return Frame(skeleton(config), family.blocks, family.outputs, own, masks)


# --- names ----------------------------------------------------------------------------------------


def hf_names(config: PretrainedConfig, layer: int) -> dict[str, str]:
    """Where the parts of pipeline layer `layer` are in the Hugging Face model: name in the layer ->
    name in the model."""
    family = family_of(config)
    if layer == 0:
        return dict(family.embedding)
    if layer <= num_blocks(config):
        return {"block": f"{family.blocks}.{layer - 1}"}
    return ({"norm": family.norm} if family.norm else {}) | {"readout": family.readout}


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


def num_blocks(config: PretrainedConfig) -> int:
    blocks: Any = skeleton(config).get_submodule(family_of(config).blocks)
    return len(blocks)


def num_positions(config: PretrainedConfig) -> int:
    """Longest sequence the model takes."""
    limit = getattr(config, "max_position_embeddings", None) or UNLIMITED
    return limit if limit > 0 else UNLIMITED


def learned_positions(config: PretrainedConfig) -> int | None:
    """How many positions the model has an embedding of, None where it computes them."""
    return num_positions(config) if "positions" in family_of(config).embedding else None
