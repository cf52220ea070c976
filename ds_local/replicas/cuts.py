"""What of a transformer block can be dealt out among replicas, and how slices of it move.

A deal is a pure function of (seed, round, layer): every replica knows all of them, so no indices
travel. A family of models is one entry of `CUTS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_local.config.sections import ReplicasConfig
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError
from ds_local.links.device import to_device
from ds_local.model.seeds import seed_for


@dataclass(frozen=True)
class Cut:
    """Where one kind of unit lies in a block.

    A dimension of size n that is cut is laid out as (repeats, units, n / repeats / units).
    """

    units: Callable[[Any], int]  # model config -> how many there are in a block
    parameters: Mapping[str, tuple[int, int]]  # name in the block -> (dimension, repeats)
    output: str  # the projection back to the residual stream; its input is what `scale` multiplies
    sizes: Sequence[str] = field(
        default=()
    )  # attributes of Hugging Face's modules that grow with the units


_LLAMA = {
    "attention_heads": Cut(
        lambda config: config.num_key_value_heads,  # one with the query heads that use it is a unit
        {f"self_attn.{p}_proj.{kind}": (0, 1) for p in "qkv" for kind in ("weight", "bias")}
        | {"self_attn.o_proj.weight": (1, 1)},
        "self_attn.o_proj",
    ),
    "mlp": Cut(
        lambda config: config.intermediate_size,
        {f"mlp.{p}_proj.{kind}": (0, 1) for p in ("gate", "up") for kind in ("weight", "bias")}
        | {"mlp.down_proj.weight": (1, 1)},
        "mlp.down_proj",
    ),
}

# GPT-2's Conv1D keeps its weight as [in, out]; its fused projection is laid out as (query, key,
# value) x heads
CUTS: dict[str, dict[str, Cut]] = {
    "gpt2": {
        "attention_heads": Cut(
            lambda config: config.n_head,
            {
                "attn.c_attn.weight": (1, 3),
                "attn.c_attn.bias": (0, 3),
                "attn.c_proj.weight": (0, 1),
            },
            "attn.c_proj",
            ("attn.num_heads", "attn.split_size", "attn.c_attn.nf", "attn.c_proj.nx"),
        ),
        "mlp": Cut(
            lambda config: config.n_inner or 4 * config.n_embd,
            {"mlp.c_fc.weight": (1, 1), "mlp.c_fc.bias": (0, 1), "mlp.c_proj.weight": (0, 1)},
            "mlp.c_proj",
            ("mlp.c_fc.nf", "mlp.c_proj.nx"),
        ),
    },
    "llama": _LLAMA,
    # fused as heads x (query, key, value), so a head is one stretch
    "gpt_neox": {
        "attention_heads": Cut(
            lambda config: config.num_attention_heads,
            {
                "attention.query_key_value.weight": (0, 1),
                "attention.query_key_value.bias": (0, 1),
                "attention.dense.weight": (1, 1),
            },
            "attention.dense",
        ),
        "mlp": Cut(
            lambda config: config.intermediate_size,
            {
                "mlp.dense_h_to_4h.weight": (0, 1),
                "mlp.dense_h_to_4h.bias": (0, 1),
                "mlp.dense_4h_to_h.weight": (1, 1),
            },
            "mlp.dense_4h_to_h",
        ),
    },
}

# factor in training on the outputs of what is dealt out, for so many replicas
TRAINING_FACTORS: dict[str, Callable[[int], float]] = {
    "none": lambda replicas: 1.0,
    "train": float,
    "eval": lambda replicas: 1.0,
    "sqrt": math.sqrt,
}


def merged_factor(scale: str, num_replicas: int) -> float:
    """Factor on the outputs of what is dealt out, in the merged model."""
    return 1.0 / num_replicas if scale == "eval" else 1.0


def saved_scaling(section: Mapping[str, Any], num_replicas: int) -> tuple[float, tuple[str, ...]]:
    """(factor on the outputs of the merged model, what it is on), from the "local_parallel" section
    of a checkpoint or a run."""
    settings = section.get("replicas", {})
    factor = (
        merged_factor(settings.get("scale", "none"), num_replicas)
        if settings.get("sync") == "subnets"
        else 1.0
    )
    return factor, tuple(sorted(settings["partition"])) if factor != 1.0 else ()


def scale_outputs(
    config: Any, layers: Mapping[int, dict[str, Tensor]], facts: Mapping[str, Any]
) -> None:
    """Put the merged model's factor into its weights, where an exported model must have it.

    Args:
        layers: layer number -> state dict, of a checkpoint; changed in place.
        facts: of the checkpoint.
    """
    factor, kinds = saved_scaling(facts["local_parallel"], facts["num_replicas"])
    outputs = [f"block.{CUTS[config.model_type][kind].output}.weight" for kind in kinds]
    for state in layers.values():
        for name in set(outputs) & state.keys():
            state[name] = state[name] * factor


def check_cut(
    config: Any, settings: ReplicasConfig, num_replicas: int, pretrained: bool = False
) -> None:
    """Raises ConfigError when a model cannot be dealt out among so many replicas."""
    if settings.sync != "subnets":
        return
    if pretrained and settings.scale == "eval":
        raise ConfigError(
            f"{SECTION}.replicas.scale 'eval' makes the merged model's parts weaker by the number "
            "of replicas, which pretrained weights do not expect; use scale 'train', or "
            "--from-scratch"
        )
    if getattr(config, "model_type", None) not in CUTS:
        raise ConfigError(
            f"{SECTION}.replicas.sync 'subnets' knows the models {', '.join(sorted(CUTS))}, made "
            "by causal_lm; use one of these, or sync 'periodic'"
        )
    for kind in settings.partition:
        units = CUTS[config.model_type][kind].units(config)
        if units % num_replicas:
            what = (
                "attention heads (key-value groups)"
                if kind == "attention_heads"
                else "MLP hidden units"
            )
            raise ConfigError(
                f"{num_replicas} replicas cannot share the {units} {what} of a block equally; "
                f"change the number of replicas, or leave {kind!r} out of "
                f"{SECTION}.replicas.partition"
            )


def deal(
    seed: int, round_: int, layer: int, kind: str, units: int, num_replicas: int
) -> list[Tensor]:
    """The units of each replica (int64, ascending): a random permutation cut into equal pieces, the
    same wherever computed."""
    generator = torch.Generator().manual_seed(seed_for(seed, "deal", round_, layer, kind))
    order = torch.randperm(units, generator=generator)
    return [piece.sort().values for piece in order.view(num_replicas, -1)]


def take(tensor: Tensor, dim: int, repeats: int, held: Tensor, units: Tensor) -> Tensor:
    """Of a tensor with the units `held`, the slice with `units`."""
    positions = to_device(torch.searchsorted(held, units), tensor.device)
    laid_out = tensor.unflatten(dim, (repeats, len(held), -1))
    return laid_out.index_select(dim + 1, positions).flatten(dim, dim + 2)


def put(tensor: Tensor, dim: int, repeats: int, held: Tensor, units: Tensor, piece: Tensor) -> None:
    """The inverse: write the slice with `units` into a tensor with the units `held`."""
    positions = to_device(torch.searchsorted(held, units), tensor.device)
    laid_out = tensor.unflatten(dim, (repeats, len(held), -1))
    shape = list(laid_out.shape)
    shape[dim + 1] = len(units)
    laid_out.index_copy_(dim + 1, positions, to_device(piece.view(shape), tensor.device))


def common(a: Tensor, b: Tensor) -> Tensor:
    """Units in both."""
    return a[torch.isin(a, b, assume_unique=True)]


Deal = dict[str, list[Tensor]]  # kind -> units of each replica
