"""Linear layers with deferred weight gradients: the half of a backward pass that no other stage
needs.

The backward of a `LinearLayer` gives the input gradient at once. Within `defer_weight_grads()` the
product that makes the weight gradient is deferred until `run_deferred`, and so it is in any layer
whose backward returns `weight_grad(...)`. Gradients of all else (biases, norms, embeddings) are
cheap and come with the input gradient. Splitting a backward so is Zero Bubble's idea (Qi et al.
2024, arXiv 2401.10241); here it costs no second walk through the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DeferredGrads = list[tuple[Tensor, Callable[[], Tensor]]]  # weight, and what computes its gradient

# What collects them, None where nobody wants them. Of the process: on a GPU autograd has threads of
# its own for backward passes.
_collecting: list[DeferredGrads | None] = []


@contextmanager
def no_weight_grads() -> Iterator[None]:
    """No weight gradients from the backward passes within, now or later."""
    _collecting.append(None)
    try:
        yield
    finally:
        _collecting.pop()


@contextmanager
def defer_weight_grads() -> Iterator[DeferredGrads]:
    """Collect the weight gradients of the backward passes within instead of computing them."""
    gradients: DeferredGrads = []
    _collecting.append(gradients)
    try:
        yield gradients
    finally:
        _collecting.pop()


def weight_grad(weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """What a layer's backward returns for `weight`: its gradient, or None where that is deferred or
    not wanted.

    Never deferred: the gradient of a weight with a graph of its own below it, which must be there,
    or with hooks, which expect a gradient.
    """
    if not _collecting or not weight.is_leaf or weight._backward_hooks:
        return compute()
    if (gradients := _collecting[-1]) is not None:
        gradients.append((weight, compute))
    return None


def run_deferred(gradients: DeferredGrads) -> None:
    """Compute deferred gradients and add them up in `weight.grad`, in the order of the backward
    pass. Each lets go of its activations when it is done; the list is empty in the end."""
    gradients.reverse()
    while gradients:
        weight, compute = gradients.pop()
        torch.autograd.backward(weight, compute())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.leaf = transposed, weight
        if not transposed or bias is None:
            return F.linear(x, weight.t() if transposed else weight, bias)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        transposed = ctx.transposed

        def product() -> Tensor:
            return inputs.t() @ rows if transposed else rows.t() @ inputs

        wanted = ctx.needs_input_grad
        return (
            (rows @ (weight.t() if transposed else weight)).view_as(x) if wanted[0] else None,
            weight_grad(ctx.leaf, product) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
            None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """[..., I] and a weight, [O, I] or, `transposed`, [I, O], to [..., O]; the weight's gradient
    can be deferred."""
    return _Linear.apply(x, weight, bias, transposed)


def casts(x: Tensor) -> bool:
    """Autocast chooses the type of each operation; what goes around it must not."""
    return torch.is_autocast_enabled(x.device.type)


class LinearLayer(nn.Linear):
    """`nn.Linear` whose weight gradient can be deferred."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x) if casts(x) else linear(x, self.weight, self.bias, transposed=False)
        )


SPLITTABLE: dict[type, type] = {nn.Linear: LinearLayer}


def make_splittable(module: nn.Module) -> None:
    """Turn the linear layers in `module` into ones whose weight gradients can be deferred.
    Subclasses of them stay as they are."""
    for layer in module.modules():
        if type(layer) in SPLITTABLE:
            layer.__class__ = SPLITTABLE[type(layer)]
