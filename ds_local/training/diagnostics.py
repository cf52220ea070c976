"""How far local learning is from backpropagation, looked at now and then on one micro-batch.

For every segment: the cosine between the gradient that the run's local row gives its layers and the
true gradient, and the norm and effective rank of the hidden state at its end. Both gradients come
from the engine's own instructions, run without an optimizer step. Costs two micro-batches, and all
stages meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_local.engine.engine import LocalPipelineEngine
from ds_local.links.agreement import gather
from ds_local.links.trees import Tree
from ds_local.schedules.schedule import Schedule

FIGURES = ("gradient_cosine", "activation_norm", "activation_rank")


def probe(engine: LocalPipelineEngine, micro_batch: Any) -> dict[int, dict[str, float]]:
    """The figures of every segment, on every rank. A collective call, between two steps.

    Args:
        engine: a `LocalPipelineEngine` whose section has `diagnostics`.
        micro_batch: as `train_batch` reads it; None on stages that read none.
    """
    outputs: dict[int, Tensor] = {}
    local, true = (
        _gradients(engine, schedule, micro_batch, outputs.__setitem__)
        for schedule in engine.plan.probe_schedules
    )
    own = {
        segment: {
            "gradient_cosine": torch.nn.functional.cosine_similarity(
                local[segment], true[segment], dim=0
            ).item(),
            **_spectrum(outputs[segment]),
        }
        for segment in engine.module.local_segments
    }
    gathered = gather(own if engine.replica_id == 0 else {})
    return dict(
        sorted((segment, figures) for part in gathered for segment, figures in part.items())
    )


def _gradients(
    engine: LocalPipelineEngine,
    schedule: Schedule,
    micro_batch: Any,
    keep: Callable[[int, Tensor], None],
) -> dict[int, Tensor]:
    """The gradient of each local segment's layers, flat, without its head's."""
    engine.run_without_step(schedule, micro_batch, keep)
    gradients = {}
    for segment in engine.module.local_segments:
        parameters = engine.module.layer_parameters(segment)
        gradients[segment] = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in parameters
            ]
        )
    engine.optimizer.zero_grad(set_to_none=True)
    return gradients


def _spectrum(hidden: Any) -> dict[str, float]:
    """Mean norm per token; effective rank: the exponential of the singular values' entropy (Roy and
    Vetterli 2007)."""
    matrix = Tree.of(hidden).slots[0].detach().float().flatten(0, -2)
    if not torch.isfinite(matrix).all():
        return {"activation_norm": math.nan, "activation_rank": math.nan}
    values = torch.linalg.svdvals(matrix - matrix.mean(0))
    shares = values / values.sum().clamp(min=1e-30)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum().item()
    return {
        "activation_norm": matrix.norm(dim=-1).mean().item(),
        "activation_rank": math.exp(entropy),
    }
