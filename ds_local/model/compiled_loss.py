"""The loss of a linear readout in compiled slices, with its gradients on the way.

For a vocabulary like GPT-2's 50,257 torch's own softmax on a GPU costs several times the matrix
products beside it; compiled, it is fused. The gradients of a slice are computed with its loss (as
Liger-Kernel, Hsu et al. 2024, and torch 2.13's `linear_cross_entropy` do), so logits are computed
once and those of one slice exist at a time.

Shapes: N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_local.model.compiling import allow_kinds

# positions of a slice: on an H200 with D = 768 and V = 50,257 no faster in larger ones
SLICE = 4096


def compiled_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T`, a float32 scalar. Its gradient has none.

    Args:
        targets_N: int64; -100 leaves a position out.
    """
    if not torch.is_grad_enabled():  # a function of our own asks its inputs alone
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _Loss.apply(hidden_ND, weight_VD, targets_N)


def _slice_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-100, reduction="sum")


@lru_cache
def _compiled() -> Any:
    allow_kinds()
    return torch.compile(_slice_loss)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        weight = weight_VD.detach().requires_grad_(wanted[1])
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        of_hidden: list[Tensor] = []
        of_weight: Tensor | None = None
        for part_ND, targets in zip(hidden_ND.split(SLICE), targets_N.split(SLICE), strict=True):
            hidden = part_ND.detach().requires_grad_(wanted[0])
            inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
            with torch.set_grad_enabled(bool(inputs)):
                loss = _compiled()(hidden, weight, targets)
            total += loss.detach()
            gradients = iter(torch.autograd.grad(loss, inputs) if inputs else ())
            if wanted[0]:
                of_hidden.append(next(gradients))
            if wanted[1]:
                found = next(gradients)
                of_weight = found if of_weight is None else of_weight.add_(found)
        ctx.save_for_backward(torch.cat(of_hidden) if of_hidden else None, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        of_hidden, of_weight = ctx.saved_tensors
        (factor,) = outer
        return (
            None if of_hidden is None else of_hidden * factor.to(of_hidden.dtype),
            None if of_weight is None else of_weight * factor.to(of_weight.dtype),
            None,
        )
