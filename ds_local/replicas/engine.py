"""What replicas ask of the engine that trains their stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from ds_local.config.schema import LocalParallelConfig
from ds_local.links.groups import Groups


class Module(Protocol):
    """A stage's layers and heads: a torch module."""

    hf_config: Any  # the Hugging Face config of the model, or None
    segment_parts: list[int]  # first layer of each segment, and the number of layers

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...


class Engine(Protocol):
    """The engine of one rank."""

    section: LocalParallelConfig
    device: torch.device
    num_stages: int
    stage_id: int
    dp_world_size: int  # replicas of each stage
    groups: Groups  # with the ranks it talks to
    global_steps: int  # optimizer steps that are done
    optimizer: Any  # torch's, or one of DeepSpeed's with the same `state` and `param_groups`

    @property
    def module(self) -> Module:
        """This stage's layers and heads."""

    def rank_of(self, stage: int, replica: int) -> int:
        """The global rank of a replica of a stage."""
