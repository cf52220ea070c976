"""Stages and heads whose compute is sleep."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.model.split_linear import weight_grad

EVENTS: list[
    tuple[str, float, float]
] = []  # (what, start, end) of all sleeps on this rank, for traces


@dataclass(frozen=True)
class Times:
    """Seconds of one stage and micro-batch, and what it holds."""

    forward: float = 0.05
    input_grad: float = 0.05
    weight_grad: float = 0.05
    head: float = 0.0
    floats: int = 64  # in an activation
    layers: int = (
        0  # real layers in a stage, each of `width`; they keep activations alive as a model's would
    )
    width: int = 0  # of an activation of `floats` / `width` rows; 0: one row

    @property
    def useful(self) -> float:
        """Without heads."""
        return self.forward + self.input_grad + self.weight_grad


def sleep(what: str, seconds: float) -> None:
    start = time.time()
    time.sleep(seconds)
    EVENTS.append((what, start, time.time()))


class _SleepBackward(torch.autograd.Function):
    """Identity whose backward takes a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, what: str, seconds: float) -> Tensor:
        ctx.what, ctx.seconds, ctx.weight = what, seconds, x if x.is_leaf else None
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        def slowly() -> Tensor:
            sleep(ctx.what, ctx.seconds)
            return gradient

        return slowly() if ctx.weight is None else weight_grad(ctx.weight, slowly), None, None


class Stage(nn.Module):
    """One pipeline stage, or with `pieces` > 1 that fraction of one. [rows, floats] -> [rows,
    floats]."""

    def __init__(self, times: Times, pieces: int = 1) -> None:
        super().__init__()
        self.forward_seconds = times.forward / pieces
        self.input_grad_seconds = times.input_grad / pieces
        self.weight_grad_seconds = times.weight_grad / pieces
        self.width = times.width
        self.bias = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(1))
        layers = [
            layer
            for _ in range(times.layers // pieces)
            for layer in (nn.Linear(times.width, times.width), nn.GELU())
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        sleep("forward", self.forward_seconds)
        # the bias makes the first stage pay for its input gradient as real layers do inside a stage
        x = _SleepBackward.apply(x + self.bias, "input gradient", self.input_grad_seconds)
        if len(self.layers):
            x = self.layers(x.view(-1, self.width)).view(x.shape)
        return x + 0 * _SleepBackward.apply(
            self.weight, "weight gradient", self.weight_grad_seconds
        )


class Head(nn.Module):
    """An auxiliary head that costs what it is told to."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.seconds:
            sleep("head", self.seconds)
        return hidden.square().mean()


def loss_fn(hidden: Tensor, labels: Tensor) -> Tensor:
    return hidden.square().mean()
