"""Layers one after the other, kept for the backward pass or computed again there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_local.links.trees import map_tensors
from ds_local.model.state import GIVEN

Layers = Sequence[Callable[[Any], Any]]


def run_layers(layers: Layers, inputs: Any, interval: int = 0) -> Any:
    """What the last layer gives.

    Args:
        interval: so many layers are computed again together in the backward pass; 0: none.
    """
    if not interval or not torch.is_grad_enabled():
        return _apply(layers, inputs)
    for start in range(0, len(layers), interval):
        part = layers[start : start + interval]
        inputs = checkpoint(_apply_to_copy, part, inputs, use_reentrant=False)
    return inputs


def _apply(layers: Layers, inputs: Any) -> Any:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def _apply_to_copy(layers: Layers, inputs: Any) -> Any:
    """For a layer that changes its input in place: recomputing must start from what it was. What
    comes with every micro-batch stays the same object, by which blocks know what they have kept."""
    copied = map_tensors(inputs, Tensor.clone)
    if isinstance(inputs, dict):
        copied |= {name: inputs[name] for name in GIVEN if name in inputs}
    return _apply(layers, copied)
