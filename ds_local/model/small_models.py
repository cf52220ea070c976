"""Smaller models of a config: its first blocks alone, or every kind of block at small sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import suppress
from types import UnionType
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ds_local.errors import UnsupportedModel
from ds_local.model.anatomy import family_of, num_blocks, skeleton
from ds_local.model.config_file import last_line

# number -> small one, by the names of the library's configs
_WIDTHS = {
    ("num_attention_heads", "n_head", "n_heads", "num_heads"): 4,
    ("hidden_size", "n_embd", "d_model", "embedding_dim", "word_embed_proj_dim", "lru_width"): 64,
    ("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "d_kv"): 16,
    ("qk_rope_head_dim", "rotary_dim"): 8,
    ("qk_head_dim",): 24,
    ("kv_lora_rank", "q_lora_rank", "o_lora_rank"): 16,
    (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "intermediate_size_mlp",
        "dense_intermediate_size",
        "expert_ffn_hidden_size",
    ): 48,
    ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"): 16,
    ("linear_num_key_heads",): 2,
    ("linear_num_value_heads", "linear_num_heads"): 4,
    ("mamba_headdim", "mamba_d_head", "mamba_head_dim"): 16,
    ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"): 8,
    ("mamba_d_ssm",): 128,
    ("attention_hidden_size",): 128,
    ("attention_head_dim",): 32,
    ("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"): 8,
}
_COUNTS = {
    ("vocab_size", "vocab_size_per_layer_input"): 96,
    (
        "sliding_window",
        "window_size",
        "local_attention",
        "attention_window_size",
        "sliding_window_size",
        "attention_chunk_size",
    ): 4,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 8,
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"): 2,
    ("n_group", "num_expert_group"): 2,
    ("topk_group",): 1,
    ("chunk_size", "mamba_chunk_size"): 8,
}
# ends of names of lists that may be as long as the model is deep, and mean something else
_OTHER_LISTS = ("token_id", "attention_types", "time_step_limit", "multipliers", "_shape", "_dim")
_FEW = 4  # sorts of blocks that a list in a config tells apart; more are numbers
_LARGEST = 20_000_000  # weights of a model that is made to be looked at


class NoPrefix(UnsupportedModel):
    """The library makes no model of so few blocks."""


def prefix(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The config of the model of the first `depth` blocks.

    Raises:
        UnsupportedModel: when its blocks are not the same as the first ones of the whole.
    """
    shorter, lists = copy.deepcopy(config), _per_block(config)
    if depth == num_blocks(config):
        return shorter
    for key, entries in lists.items():
        setattr(shorter, key, entries[:depth])
    if "attention_layers" in lists and hasattr(config, "attention_types"):  # the same, as counts
        shorter.attention_types = [[[kind], 1] for kind in lists["attention_layers"][:depth]]
    shorter.num_hidden_layers = depth
    try:
        found = kinds(shorter, lists)
    except Exception as error:  # of the library's code
        raise NoPrefix(
            f"its first {depth} blocks are no model by themselves: {last_line(error)}"
        ) from error
    if found != kinds(config, lists)[:depth]:
        raise UnsupportedModel(
            "what its blocks compute depends on how many there are, so the first ones are no model "
            "by themselves"
        )
    return shorter


def _per_block(config: PretrainedConfig) -> dict[str, Any]:
    """What the config gives for each block."""
    depth = num_blocks(config)
    return {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and not key.endswith(_OTHER_LISTS)
    }


def kinds(config: PretrainedConfig, lists: Collection[str] | None = None) -> list[tuple[Any, ...]]:
    """What tells the blocks apart: shapes, plain attributes of their modules, entries of the
    config's `lists`, which default to those that have one for each block."""
    blocks = list(skeleton(config).get_submodule(family_of(config).blocks).children())
    values = [getattr(config, key) for key in (_per_block(config) if lists is None else lists)]
    return [
        (*_signature(block), *(str(entries[number]) for entries in values))
        for number, block in enumerate(blocks)
    ]


_NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "training")  # of any block


def _signature(block: nn.Module, types: type | UnionType = bool | int | float | str) -> list[Any]:
    found: list[Any] = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
    for name, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, types) and key not in _NUMBERS
        }
        found.append((name, type(module).__name__, tuple(sorted(plain.items()))))
    return found


def _sorts(config: PretrainedConfig) -> list[tuple[Any, ...]]:
    """What tells the blocks apart but for numbers, of which each may have its own."""
    blocks = skeleton(config).get_submodule(family_of(config).blocks).children()
    few = [values for values in _per_block(config).values() if len(set(map(str, values))) <= _FEW]
    return [
        (*_signature(block, bool | str), *(str(values[number]) for values in few))
        for number, block in enumerate(blocks)
    ]


def shrunk(config: PretrainedConfig, run: Callable[[PretrainedConfig], object]) -> PretrainedConfig:
    """A small model's config, with every kind of block: at small widths, or where these do not fit
    together at its own.

    Args:
        run: makes the model of a config and runs it; raises where that fails.

    Raises:
        UnsupportedModel: when none runs, or only one that would take long.
    """
    of_each = _sorts(config)
    depth = max(of_each.index(sort) for sort in set(of_each)) + 1
    shallow = _with(prefix(config, max(depth, min(2, len(of_each)))), _COUNTS)
    failed: Exception | None = None
    for table in (_WIDTHS, {}):
        try:
            small = _with(shallow, table)
            if sum(p.numel() for p in skeleton(small).parameters()) <= _LARGEST:
                run(small)
                return small
        except Exception as error:  # of the library's code, about sizes that do not fit
            failed = failed or error
    raise UnsupportedModel(
        "no model like it is small enough to be tried out"
        if failed is None
        else f"a small model like it fails: {last_line(failed)}"
    ) from failed


def _with(config: PretrainedConfig, table: dict[tuple[str, ...], int]) -> PretrainedConfig:
    small = copy.deepcopy(config)
    names = {config.attribute_map.get(key, key): key for key in config.attribute_map}
    for keys, number in table.items():
        for key in keys:
            value = getattr(config, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > number:
                with suppress(AttributeError):  # computed from the others
                    setattr(small, names.get(key, key), number)
    if table is _WIDTHS:
        _match(config, small)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(config, key, None), int | list):
            setattr(small, key, None if key == "pad_token_id" else 0)
    return small


def _match(config: PretrainedConfig, small: PretrainedConfig) -> None:
    """Sizes that hang together."""
    heads, groups, of_head, of_rotary = (
        getattr(config, key, None)
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "qk_rope_head_dim")
    )
    if isinstance(groups, int):
        small.num_key_value_heads = 4 if groups == heads else 1 if groups == 1 else 2
    if hasattr(config, "expand") and hasattr(config, "num_heads"):  # heads of a state-space model
        small.num_heads = small.expand * small.hidden_size // small.head_dim
    if hasattr(config, "mamba_d_ssm"):
        small.mamba_d_ssm = small.mamba_n_heads * small.mamba_d_head
    if of_head is not None and of_head == of_rotary:
        small.head_dim = small.qk_rope_head_dim
