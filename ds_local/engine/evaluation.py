"""Every segment's loss without training. All stages meet here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_local.engine.executor import Executor
from ds_local.links.trees import map_tensors


def evaluate(
    executor: Executor,
    module: Any,
    data: Iterator[Any],
    num_micro_batches: int,
    compute_loss: bool = True,
    return_logits: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Any]:
    """Run micro-batches forward through this stage.

    Args:
        executor: of this stage.
        module: the `LocalPipelineModule`, in evaluation mode.
        data: micro-batches; read where the first segment is.
        stop: asked there before each micro-batch; once it says yes this is the last one of the
            replica, and `executor.run_ends` is set on all its ranks.

    Returns:
        (sums [2, K] float64: of weighted losses and of weights, zero for other stages' segments;
        what the last layer gives for the last micro-batch, None on other stages or unless asked).
    """
    sums = torch.zeros(2, module.num_segments, dtype=torch.float64, device=executor.device)
    logits = None
    for micro_batch in range(num_micro_batches):
        if executor.run_ends:
            break
        executor.run_ends = 0 in module.local_segments and stop()
        for segment in module.local_segments:
            at = {"segment": segment, "micro_batch": -1 - micro_batch}  # never one of training
            hidden, labels = executor.forward_only(data, **at)
            if return_logits and segment + 1 == module.num_segments:
                logits = module.logits_of(map_tensors(hidden, Tensor.clone))
            if compute_loss and module.has_loss(segment):
                weight = module.weight_of(labels)
                sums[0, segment] += module.loss_of(segment, hidden, labels) * weight
                sums[1, segment] += weight
    return sums, logits


def mean_losses(sums: Tensor) -> tuple[dict[int, float], float]:
    """(loss of every segment that has one, the model's own loss or zero), from sums over all
    ranks."""
    losses = (sums[0] / sums[1]).tolist()
    counted = sums[1].tolist()
    found = {s: loss for s, loss in enumerate(losses) if counted[s]}
    return found, losses[-1] if counted[-1] else 0.0
