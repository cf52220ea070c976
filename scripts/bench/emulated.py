"""Pipelines whose compute is sleep: real engines, real processes, real messages, on few cores.

Idle time of one rank is not eaten by another one's compute, so four or eight stages show their bubbles on two cores. A stage
sleeps in its forward and, in two autograd nodes, for its input gradient and for its weight gradient, so that schedules that split
the backward pass are treated fairly. Each function here runs one system on one rank and returns what that rank saw.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Times:
    """Seconds of one stage and micro-batch."""

    forward: float = 0.05
    input_grad: float = 0.05
    weight_grad: float = 0.05
    head: float = 0.0
    floats: int = 64  # in an activation

    @property
    def useful(self) -> float:
        """Without heads."""
        return self.forward + self.input_grad + self.weight_grad


class _SleepBackward(torch.autograd.Function):
    """Identity whose backward takes a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class Stage(nn.Module):
    """One pipeline stage, or with `pieces` > 1 that fraction of one."""

    def __init__(self, times: Times, pieces: int = 1) -> None:
        super().__init__()
        self.forward_seconds = times.forward / pieces
        self.input_grad_seconds = times.input_grad / pieces
        self.weight_grad_seconds = times.weight_grad / pieces
        self.bias = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.forward_seconds)
        # the bias makes the first stage pay for its input gradient as real layers do inside a stage
        x = _SleepBackward.apply(x + self.bias, self.input_grad_seconds)
        return x + 0 * _SleepBackward.apply(self.weight, self.weight_grad_seconds)


class Head(nn.Module):
    """An auxiliary head that costs what it is told to."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return hidden.square().mean()


def loss_fn(hidden: Tensor, labels: Tensor) -> Tensor:
    return hidden.square().mean()


def ds_local(section: dict[str, Any], times: Times, stages: int, micro_batches: int, steps: int) -> dict[str, Any]:
    """This package with any `local_parallel` section."""
    import ds_local as package
    from ds_local.profiling import Recorder

    config = _config(micro_batches) | {"local_parallel": section}
    module = package.LocalPipelineModule(
        [Stage(times) for _ in range(stages)], stages, loss_fn=loss_fn, head=lambda segment: Head(times.head), config=config
    )
    engine = package.initialize(model=module, config=config)[0]
    engine.recorder = Recorder(engine.device)
    data = _data(times, micro_batches * steps)
    live, ends = 0, []
    for _ in range(steps):
        engine.train_batch(data)
        ends.append(time.time())
    live = engine._train_schedule().num_pipe_buffers()
    return {"ends": ends, "live": live, "events": list(engine.recorder.events)}


def deepspeed_pipeline(times: Times, stages: int, micro_batches: int, steps: int, dualpipev: bool = False) -> dict[str, Any]:
    """DeepSpeed's own PipelineEngine (1F1B) or DualPipeVEngine."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    layers = [Stage(times, 2 if dualpipev else 1) for _ in range(stages * (2 if dualpipev else 1))]
    module_class = DualPipeVModule if dualpipev else PipelineModule
    module = module_class(layers, num_stages=stages, loss_fn=loss_fn, partition_method="uniform")
    engine = deepspeed.initialize(model=module, config=_config(micro_batches))[0]
    data = _data(times, micro_batches * steps)
    ends = []
    for _ in range(steps):
        engine.train_batch(data)
        ends.append(time.time())
    return {"ends": ends, "live": min(stages - engine.stage_id, micro_batches)}


def _config(micro_batches: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_batches, "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000, "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
    }  # fmt: skip


def _data(times: Times, number: int) -> Any:
    return iter([(torch.ones(1, times.floats), torch.zeros(1))] * number)


def period(results: list[dict[str, Any]], warm: int) -> float:
    """Seconds a step takes once the run has settled: from a warm step to the last one, on the rank that is last."""
    return max((r["ends"][-1] - r["ends"][warm - 1]) / (len(r["ends"]) - warm) for r in results)
