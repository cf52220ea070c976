"""What a pipeline module is asked for, checked before processes meet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from deepspeed import comm as dist
from deepspeed.pipe import TiedLayerSpec
from torch import nn

from ds_local.config.deepspeed import batch_sizes, check_number
from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError
from ds_local.model import blocks
from ds_local.replicas.cuts import check_cut
from ds_local.schedules.run_plan import RunPlan, head_segments


def check_arguments(loss_fn: Any, head: Any, activation_checkpoint_interval: Any) -> None:
    for name, value in (("loss_fn", loss_fn), ("head", head)):
        if value is not None and not callable(value):
            raise ConfigError(f"{name} is a {type(value).__name__}; pass a function")
    if isinstance(loss_fn, nn.Module):
        learning = [name for name, p in loss_fn.named_parameters() if p.requires_grad]
        if learning:
            raise ConfigError(
                f"loss_fn has weights that learn ({', '.join(learning[:3])}), and no checkpoint "
                "would hold them; put them into the last layer, or freeze them"
            )
    check_number("activation_checkpoint_interval", activation_checkpoint_interval, least=0)


def check_batches(
    ds_config: Mapping[str, Any],
    section: LocalParallelConfig,
    num_stages: int,
    num_replicas: int,
) -> None:
    """The steps' schedules can be made, where the config says how large a step is."""
    if {"train_batch_size", "train_micro_batch_size_per_gpu"} & ds_config.keys():
        _, num_micro_batches = batch_sizes(ds_config, num_replicas)
        _ = RunPlan.of(section, num_stages, num_micro_batches).schedules


def _shared_weights(layers: Sequence[Any], num_stages: int) -> str | None:
    """Which layers share weights, if any do. Modules may on one stage; DeepSpeed keeps a tied
    layer apart from the layers, where checkpoints here would not find it."""
    owner: dict[nn.Parameter, int] = {}
    for number, layer in enumerate(layers):
        if isinstance(layer, TiedLayerSpec):
            return f"layer {number} is a TiedLayerSpec"
        for parameter in layer.parameters() if isinstance(layer, nn.Module) else ():
            if owner.setdefault(parameter, number) != number and num_stages > 1:
                return f"layers {owner[parameter]} and {number} share weights"
    return None


def stages_of(section: LocalParallelConfig, num_stages: int | None, topology: Any) -> int:
    """Checked against the number of processes, which the launcher has announced even before they
    have met."""
    if topology is not None:
        axes = sorted(topology.get_axis_names())
        if axes != ["data", "pipe"]:
            raise ConfigError(f"topology has the axes {axes}; make one of pipe and data")
        num_stages = topology.get_dim("pipe")
    return num_stages_and_replicas(section, world_size(), num_stages)[0]


def world_size() -> int:
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def _check_of_use(section: LocalParallelConfig) -> None:
    """Refuse what only `causal_lm` reads, for layers of one's own."""
    unread = [f"head.{name}" for name in section.head.chosen() if name != "every"]
    unread += ["partition"] if section.partition != "cost" else []
    if unread:
        raise ConfigError(
            f"{SECTION}.{unread[0]} is for the language models that causal_lm makes, and nothing "
            "reads it with layers and heads of your own; remove it"
        )


def check_layers(
    layers: Sequence[Any],
    num_stages: int,
    section: LocalParallelConfig,
    parts: Sequence[int] | None,
    has_heads: bool,
) -> None:
    """The layers can be cut as asked for.

    Raises:
        ConfigError: naming the key or argument, the values and the remedy.
    """
    num_segments = num_stages * section.segments_per_stage
    section.check_lengths(num_segments)
    if num_segments > len(layers):
        raise ConfigError(
            f"{num_stages} stages x {section.segments_per_stage} segments need at least "
            f"{num_segments} layers, the model has {len(layers)}; lower num_stages or "
            "segments_per_stage"
        )
    if shared := _shared_weights(layers, num_stages):
        raise ConfigError(
            f"{shared}: weights that stages share need a collective over all stages in every "
            "step; use separate layers (untied)"
        )
    if not any(getattr(layer, "typename", None) is blocks.Block for layer in layers):
        check_cut(None, section.replicas, 1)
        _check_of_use(section)
    if parts is not None:
        rising = all(a < b for a, b in pairwise(parts))
        if (
            len(parts) != num_segments + 1
            or parts[0] != 0
            or parts[-1] != len(layers)
            or not rising
        ):
            raise ConfigError(
                f"local_parallel.parts is {list(parts)}; it needs {num_segments + 1} "
                f"increasing numbers from 0 to the number of layers, {len(layers)}"
            )
    # this also refuses routes that do not fit
    if head_segments(section, num_segments) and not has_heads:
        raise ConfigError(
            "the routes give segments before the last a loss; pass head=make_head to "
            "LocalPipelineModule"
        )
