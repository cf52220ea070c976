"""Weights and the optimizer's state are finite, or no checkpoint of them is written or goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_local.errors import CheckpointError
from ds_local.links.agreement import gather
from ds_local.links.device import to_device


class Holder(Protocol):
    """A rank with its weights and its optimizer: an engine."""

    global_rank: int
    basic_optimizer: Any

    @property
    def module(self) -> nn.Module: ...


def check_weights_finite(engine: Holder, what: str, remedy: str) -> None:
    """Weights and the optimizer's state on all ranks are finite. A collective call.

    Args:
        what, remedy: of the sentence, before and after what was found.

    Raises:
        CheckpointError: on every rank, naming what is not.
    """
    named = [
        *engine.module.named_parameters(),
        *((name, _without_infinities(b)) for name, b in engine.module.named_buffers()),
        *_optimizer_tensors(engine.basic_optimizer),
    ]
    sums = [(name, tensor.detach().sum()) for name, tensor in named if tensor.is_floating_point()]
    device = next(engine.module.parameters()).device  # some optimizers count their steps on a CPU
    numbers = torch.stack([to_device(total, device) for _, total in sums])
    flags = numbers.isfinite().tolist()  # the one host read
    bad = [name for (name, _), fine in zip(sums, flags, strict=True) if not fine]
    own = (engine.module.stage, engine.global_rank, bad[:3], len(bad))
    for stage, rank, names, count in gather(own):
        if count:
            more = f" and {count - len(names)} more" if count > len(names) else ""
            raise CheckpointError(
                f"{what} stage {stage} (rank {rank}) holds numbers that are not finite in "
                f"{', '.join(names)}{more}; {remedy}"
            )


def _without_infinities(buffer: Tensor) -> Tensor:
    """A mask may well hold them."""
    if not buffer.is_floating_point():
        return buffer
    return buffer.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)


def _optimizer_tensors(optimizer: Any) -> Iterable[tuple[str, Tensor]]:
    """Masters and moments, as DeepSpeed's optimizers keep them in the one they wrap."""
    for group in getattr(optimizer, "param_groups", ()):
        for parameter in group["params"]:
            yield "the optimizer's weights", parameter
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {name}", value
