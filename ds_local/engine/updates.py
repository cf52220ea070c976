"""What a step ends with: gradients averaged over replicas, looked at, clipped, and applied or left
out."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ds_local.engine.deepspeed_seam import gradient_of, spoil_gradients
from ds_local.engine.finite import KINDS, WEIGHTS


class Updates:
    """The end of a stage's steps; a part of the engine.

    DeepSpeed's bf16 and ZeRO optimizers clip and update a stage whole or not at all. Any other
    optimizer can take its segments one by one, as they would be on stages of their own.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._one_by_one = not engine.zero_optimization() and not engine.using_bf16_optimizer
        self._weights = {
            segment: list(engine.module.segment_parameters(segment))
            for segment in engine.module.local_segments
        }
        self._norms: dict[int, Any] = {}  # of each segment's gradient, where they count one by one
        self._flags = torch.zeros(0)  # of `Watch`
        self._read: dict[int, dict[str, float]] = {}  # segment -> figures that the host knows

    def reduce(self) -> None:
        """Average gradients and losses over the replicas of this stage, unless they train apart."""
        engine, watch, norms = self._engine, self._engine.executor.watch, {}
        for segment, parameters in self._weights.items():
            gradients = [g for g in map(gradient_of, parameters) if g is not None]
            if gradients:
                norms[segment] = get_total_norm(gradients)
                watch.see(WEIGHTS, segment, [norms[segment]])
        averages = engine.is_data_parallel and engine.replicas.reduces_gradients
        self._norms = norms if self._one_by_one and not averages else {}
        self._flags = watch.flags(engine.device)
        if not engine.replicas.reduces_gradients or (
            not engine.is_data_parallel and not engine.zero_optimization()
        ):
            return
        # DeepSpeed fills in zeros for parameters without a gradient; an optimizer would decay a
        # head that is not in use
        unused = [p for p in engine.module.parameters() if p.requires_grad and p.grad is None]
        engine.average_gradients()
        if self._one_by_one:
            for parameter in unused:
                parameter.grad = None
        if averages:
            self._average_losses()

    def _average_losses(self) -> None:
        """Means over the replicas, weighted as their micro-batches are; what one replica found not
        finite, all have found."""
        engine = self._engine
        count = len(engine.segment_losses)
        counted = [engine.executor.counted[segment] for segment in engine.segment_losses]
        weights = torch.tensor([weight / number for weight, number in counted])
        weights = weights.to(engine.device, non_blocking=True)
        losses = [loss.float().view(1) for loss in engine.segment_losses.values()]
        weighted = torch.cat(losses) * weights if losses else weights
        numbers = torch.cat([weighted, weights, self._flags])
        dist.all_reduce(numbers, group=engine.grid.get_data_parallel_group())
        sums, weights, self._flags = numbers.split([count, count, len(numbers) - 2 * count])
        means = sums / weights.clamp(min=torch.finfo(weights.dtype).tiny)
        engine.segment_losses = dict(zip(engine.segment_losses, means, strict=True))

    def clip(self) -> None:
        """Clip each segment by its own gradient norm, where segments count one by one."""
        engine = self._engine
        for segment, parameters in self._weights.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                limit = engine.gradient_clipping() * engine.section.clip_multiplier(segment)
                if segment not in self._norms:  # replicas have averaged since it was measured
                    self._norms[segment] = get_total_norm(gradients)
                clip_grads_with_norm_(parameters, limit, self._norms[segment])

    def take(self, lr_kwargs: Any) -> None:
        """DeepSpeed's optimizer step, but for segments whose numbers are not finite. Their weights
        and moments stay as they are, and all else goes on as on other stages."""
        engine = self._engine
        kinds = self._judge()
        if kinds and not self._one_by_one:
            spoil_gradients(engine.optimizer)
        for segment in kinds if self._one_by_one else ():
            self._leave_out(segment)
        engine.step_optimizer(lr_kwargs)
        if not self._one_by_one and engine.optimizer.overflow:
            kinds = kinds or dict.fromkeys(self._weights, "gradient")
            if engine.lr_scheduler is not None:  # DeepSpeed would hold it back
                engine.lr_scheduler.step(**(lr_kwargs or {}))
        elif kinds:
            engine.skipped_steps += 1
        engine.events.book(engine.global_steps, kinds, engine.skipped_steps)

    def _leave_out(self, segment: int) -> None:
        self._norms.pop(segment, None)  # it has been read
        apart = not self._engine.replicas.reduces_gradients
        for parameter in (p for p in self._weights[segment] if p.grad is not None):
            # replicas that train apart exchange moments, so each must have some
            first = not self._engine.optimizer.state.get(parameter)
            parameter.grad = torch.zeros_like(parameter) if apart and first else None

    def _judge(self) -> dict[int, str]:
        """The segments that must not be updated, and why. The one time in a step that the host
        waits for the device; what the reports need is read on the same occasion."""
        engine = self._engine
        rate, step = engine.get_lr()[0], engine.global_steps
        self._read = {
            segment: {"lr": rate * engine.section.lr_multiplier(segment, step)}
            for segment in self._weights
        }
        wanted: list[tuple[int, str, Tensor]] = [
            (segment, name, value)
            for name, values in (("loss", engine.segment_losses), ("grad_norm", self._norms))
            for segment, value in values.items()
        ]
        numbers = torch.cat([*(value.view(1) for *_, value in wanted), self._flags]).tolist()
        for (segment, name, _), number in zip(wanted, numbers, strict=False):
            self._read[segment][name] = number
        return engine.executor.watch.judge(numbers[len(wanted) :])

    def figures(self, segment: int) -> dict[str, Any]:
        """Of the step that ends; see `reports.FIGURES`."""
        engine = self._engine
        kind, event = engine.events.newest.get(segment, (None, None))
        return {
            "step": engine.global_steps,
            "grad_norm": self._norms.get(segment, engine.get_global_grad_norm()),
            "nonfinite": None if kind is None else KINDS.index(kind),
            "nonfinite_step": event,
            "skipped": engine.skipped_steps,
            **self._read[segment],
        }
