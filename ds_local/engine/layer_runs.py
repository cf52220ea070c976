"""Layers one after the other, kept for the backward pass or computed again there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
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
        before = BuffersAsTheyAre(part)
        inputs = checkpoint(
            _apply_to_copy, part, inputs, use_reentrant=False, context_fn=before.contexts
        )
    return inputs


class BuffersAsTheyAre:
    """Within, layers have copies of the buffers that they have now: what is computed again reads
    what the first forward read, and changes nothing. May be entered time and again.

    Args:
        layers: functions have none.
    """

    def __init__(self, layers: Layers) -> None:
        modules = [layer for layer in layers if isinstance(layer, nn.Module)]
        owners = {id(m): m for one in modules for m in one.modules() if m._buffers}
        self._found: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, buffer.detach().clone())
            for module in owners.values()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype != torch.bool  # masks
        ]
        self._own: list[Tensor | None] = []

    def __enter__(self) -> None:
        self._own = [module._buffers[name] for module, name, _ in self._found]
        for module, name, before in self._found:
            module._buffers[name] = before.clone()

    def __exit__(self, *failure: Any) -> None:
        for (module, name, _), buffer in zip(self._found, self._own, strict=True):
            module._buffers[name] = buffer

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of the forward and of each recomputation."""
        return nullcontext(), self if self._found else nullcontext()


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
