"""CSV files that torch's own pipelining writes, and what it computes by them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

# schedule class -> where it puts the two segments of a rank, of so many ranks
PLACEMENTS: dict[str, Any] = {
    "Interleaved1F1B": lambda rank, ranks: [rank, rank + ranks],
    "InterleavedZeroBubble": lambda rank, ranks: [rank, rank + ranks],
    "ZBVZeroBubble": lambda rank, ranks: [rank, 2 * ranks - 1 - rank],
    "DualPipeV": lambda rank, ranks: [rank, 2 * ranks - 1 - rank],
}


def loss_of(outputs: Any, targets: Any) -> Any:
    from torch.nn import functional as F

    return F.mse_loss(outputs, targets)


def write(name: str, ranks: int, micro_batches: int, path: Any, comms: bool = False) -> None:
    """Write a schedule's file, with or without transfers, in one process."""
    from torch import nn
    from torch.distributed.pipelining.schedules import get_schedule_class

    last = 2 * ranks - 1
    stages: Any = [
        SimpleNamespace(
            stage_index=index,
            is_first=index == 0,
            is_last=index == last,
            num_stages=last + 1,
            group_size=ranks,
            group_rank=0,
            submod=nn.Identity(),
            has_backward=True,
        )
        for index in PLACEMENTS[name](0, ranks)
    ]
    schedule: Any = get_schedule_class(name)(stages, micro_batches, loss_fn=loss_of)
    schedule._dump_csv(path, format="compute_comms" if comms else "compute_only")


def train(name: str, layers: list[Any], x: Any, y: Any, micro_batches: int, lr: float) -> Any:
    """One step of plain SGD by torch's schedule on the ranks there are.

    Args:
        layers: one for each of torch's stages.
        x, y: of the whole step.

    Returns:
        (losses of the micro-batches where the last stage is, weights of this rank's layers).
    """
    import torch
    from torch import distributed as dist
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    held = PLACEMENTS[name](dist.get_rank(), dist.get_world_size())
    last = len(layers) - 1
    stages = [PipelineStage(layers[i], i, last + 1, torch.device("cpu")) for i in held]
    schedule: Any = get_schedule_class(name)(stages, micro_batches, loss_fn=loss_of)
    losses: list[Any] = []
    schedule.step(*([x] if 0 in held else []), target=y if last in held else None, losses=losses)
    with torch.no_grad():
        for i in held:
            for parameter in layers[i].parameters():
                parameter -= lr * parameter.grad
    weights = {f"{i}.{n}": p.detach() for i in held for n, p in layers[i].named_parameters()}
    return [loss.item() for loss in losses], weights
