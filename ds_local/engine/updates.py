"""The end of a step, stage by stage: averages over replicas, clipping, the finite check, the
update.

What DeepSpeed computes over all stages here (norms, overflow) is computed per stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from deepspeed import comm as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.engine.async_saves import AsyncSaves
from ds_local.engine.average import Average
from ds_local.engine.deepspeed_seam import PipelineEngineSeam, gradient_of, spoil_gradients
from ds_local.engine.executor import Executor
from ds_local.engine.finite import WEIGHTS, Events
from ds_local.engine.kept_buffers import KeptBuffers, Replicas
from ds_local.engine.module import LocalPipelineModule
from ds_local.engine.reports import Reports
from ds_local.engine.resting import at_rest
from ds_local.errors import ConfigError, RunError, first_line
from ds_local.links.device import to_device
from ds_local.replicas.head_copies import Copies
from ds_local.replicas.sync import Together
from ds_local.schedules.run_plan import RunPlan


class StageUpdates(PipelineEngineSeam):
    """How a stage ends a step by itself. A part of `LocalPipelineEngine`."""

    module: LocalPipelineModule
    section: LocalParallelConfig
    executor: Executor
    plan: RunPlan
    events: Events
    replicas: Together
    copies: Copies
    reports: Reports
    replica_id: int
    num_segments: int
    segment_losses: Any  # by segment
    saves: AsyncSaves | None  # None: a save returns when its files are whole
    moved: str = ""  # what the newest `load_checkpoint` brought from another layout, in words
    _one_by_one: bool  # segments can be updated one by one: fp32 without ZeRO
    _grad_norms: dict[int, Any]
    _flags: torch.Tensor
    _used: torch.Tensor = torch.zeros(0)  # of each of `_learning`, replicas that had a gradient
    _learning: Sequence[torch.nn.Parameter] = ()
    _read: dict[int, dict[str, Any]]
    kept_buffers: KeptBuffers
    _broken: str = ""  # what ended a step that left something
    _updates: bool = False  # the step is at its end, where weights change

    def _prepare_updates(self) -> None:
        group, first = self.grid.get_data_parallel_group(), self.rank_of(self.stage_id, 0)
        replicas = Replicas(group, first, self.device) if self.is_data_parallel else None
        self.kept_buffers = KeptBuffers(self.module, replicas)
        self.module.on_load.append(self.kept_buffers.keep)
        self._scale_by_segment()

    def _scale_by_segment(self) -> None:
        """Learning rates of the config's factors, in the parameter groups by segment that
        `initialize` made."""
        if not self.section.scales_learning_rates:
            return
        kept: list[float] = []
        if any("segment" not in group for group in self.basic_optimizer.param_groups):
            raise ConfigError(
                f"the optimizer {type(self.basic_optimizer).__name__} has groups of weights of its "
                "own, so segments cannot have learning rates of their own; leave out "
                f"{SECTION}.lr_multipliers, warmup_stagger and delay_discount, or take another"
            )

        def scale(optimizer: Any, *_: Any) -> None:
            kept[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= self._rate_factor(group["segment"])

        def restore(optimizer: Any, *_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = rate

        self.basic_optimizer.register_step_pre_hook(scale)
        self.basic_optimizer.register_step_post_hook(restore)

    def _rate_factor(self, segment: int) -> float:
        step = self.global_steps
        return self.section.lr_multiplier(segment, step) * self.plan.rate_factor(segment, step)

    def clip_fp32_gradients(self) -> None:
        """Clip each segment by its own gradient norm. DeepSpeed's version takes stage 0's norm for
        all stages."""
        for segment, parameters in self._weights.items():
            learning = [p for p in parameters if p.grad is not None]
            if learning:
                limit = self.gradient_clipping() * self.section.clip_multiplier(segment)
                if segment not in self._grad_norms:  # its gradients are new: zeros, see `take_step`
                    self._grad_norms[segment] = get_total_norm(
                        [p.grad for p in learning if p.grad is not None]
                    )
                clip_grads_with_norm_(learning, limit, self._grad_norms[segment])

    @cached_property
    def _weights(self) -> dict[int, list[torch.nn.Parameter]]:
        return {s: list(self.module.segment_parameters(s)) for s in self.module.local_segments}

    @contextmanager
    def _whole_step(self) -> Iterator[None]:
        """A step that fails on its way leaves nothing for the next one: neither gradients nor
        micro-batches. Where that cannot be, no other step is made before a checkpoint is loaded.

        Raises:
            RunError: such a step came before.
        """
        if self._broken:
            raise RunError(
                f"step {self.global_steps + 1} of this engine ended on its way ({self._broken}), "
                "and what it left cannot be taken back: load a checkpoint into a new engine and go "
                "on from there"
            )
        ahead, self._updates = self.executor.stash.under_way, False
        try:
            yield
        except BaseException as failure:
            begun = bool(self.executor.live or self.executor.losses)
            alone = dist.get_world_size() == 1 and self.module.unit is None and not ahead
            if alone and not self._updates and (self._one_by_one or not begun):
                self.executor.leave_out()
                for parameter in self.module.parameters():
                    parameter.grad = None
            else:
                self._broken = first_line(failure)
            raise

    @property
    def half_updated(self) -> bool:
        """Did a step end where weights change?"""
        return bool(self._broken) and self._updates

    def reduce_gradients(self) -> None:
        """Average gradients and losses over the replicas of this stage, unless they train apart."""
        self._updates = True
        self.executor.stash.before_update()
        watch, norms = self.executor.watch, self._norms()
        for segment in self.module.local_segments:
            watch.see(WEIGHTS, segment, [norms.get(segment)])
        averages = self.is_data_parallel and self.replicas.reduces_gradients
        self._grad_norms = norms if self._one_by_one and not averages else {}
        self._flags = watch.flags(self.device)
        if not self.replicas.reduces_gradients or (
            not self.is_data_parallel and not self.zero_optimization()
        ):
            return
        if self._one_by_one:
            self._learning = [p for p in self.module.parameters() if p.requires_grad]
        used = torch.tensor([float(p.grad is not None) for p in self._learning])
        # fills in zeros for parameters without a gradient; an optimizer would decay a head that is
        # not in use, so `_judge` takes them away again where no replica had one
        self.average_gradients()
        if averages:
            self._average_losses(used)
        if averages and self._one_by_one and self.gradient_clipping():
            self._grad_norms = self._norms()  # in time for the one read of the step

    def _norms(self) -> dict[int, torch.Tensor]:
        """Of the gradient of each segment that has one."""
        gradients = {
            segment: [g for g in map(gradient_of, parameters) if g is not None]
            for segment, parameters in self._weights.items()
        }
        return {segment: get_total_norm(found) for segment, found in gradients.items() if found}

    def _average_losses(self, used: torch.Tensor) -> None:
        """Means over the replicas, weighted as their micro-batches are; what one replica found not
        finite, all have found.

        Args:
            used: of each of `_learning`, 1 where this replica had a gradient.
        """
        count = len(self.segment_losses)
        counted = [self.executor.counted[segment] for segment in self.segment_losses]
        weights = to_device(
            torch.tensor([weight / number for weight, number in counted]), self.device
        )
        losses = [loss.float().view(1) for loss in self.segment_losses.values()]
        weighted = torch.cat(losses) * weights if losses else weights
        numbers = torch.cat([weighted, weights, to_device(used, self.device), self._flags])
        dist.all_reduce(numbers, group=self.grid.get_data_parallel_group())
        sizes = [count, count, len(used), len(self._flags)]
        sums, weights, self._used, self._flags = numbers.split(sizes)
        means = sums / weights.clamp(min=torch.finfo(weights.dtype).tiny)
        self.segment_losses = dict(zip(self.segment_losses, means, strict=True))

    def take_step(self, lr_kwargs: Any) -> None:
        """DeepSpeed's, but for segments whose numbers are not finite. Their weights and moments
        stay as they are, and all else goes on as on other stages.

        DeepSpeed's bf16 and ZeRO optimizers update a stage whole or not at all.
        """
        kinds, average = self._judge(), self.average
        if kinds and not self._one_by_one:
            spoil_gradients(self.optimizer)
        elif kinds:
            for segment in kinds:
                self._grad_norms.pop(segment, None)  # it has been read
                for parameter in (p for p in self._weights[segment] if p.grad is not None):
                    # replicas that train apart exchange moments, so each must have some
                    first = not self.optimizer.state.get(parameter)
                    apart = not self.replicas.reduces_gradients
                    parameter.grad = torch.zeros_like(parameter) if first and apart else None
        with self.executor.stash.during_update(), self._others_at_rest():
            self.step_optimizer(lr_kwargs)
        if not self._one_by_one:
            norm = self.get_global_grad_norm()  # read once for all segments
            norm = None if norm is None else float(norm)
            self._grad_norms = dict.fromkeys(self.module.local_segments, norm)
        if not self._one_by_one and self.optimizer.overflow:
            kinds = kinds or dict.fromkeys(self.module.local_segments, "gradient")
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**(lr_kwargs or {}))
        elif kinds:
            self.skipped_steps += 1
        meets = not self.global_steps % self.section.replicas.every
        self.kept_buffers.mend(shares=self.replicas.reduces_gradients or meets)
        average.update(self.global_steps)
        self.events.book(self.global_steps, kinds, self.skipped_steps)

    def _others_at_rest(self) -> AbstractContextManager[None]:
        """Around an update: heads that are not in use keep their weights and moments. The optimizer
        leaves out what has no gradient by itself where it steps weights one by one."""
        resting = [
            parameter
            for segment, head in self.module.heads.items()
            if int(segment) not in self.segment_losses
            for parameter in head.parameters()
            if parameter.requires_grad
        ]
        if self._one_by_one or not resting:
            return nullcontext()
        return at_rest(self.optimizer, self.basic_optimizer.state, resting)

    @cached_property
    def average(self) -> Average:
        """Running averages of this stage's weights, as "ema" asks for them."""
        return Average.of(self.module)

    @property
    def own_loss(self) -> torch.Tensor:
        """Of the last local segment that has a loss in the newest step; zero where none has."""
        losses = self.segment_losses
        return losses[max(losses)] if losses else torch.zeros((), device=self.device)

    @property
    def losses_read(self) -> dict[int, float]:
        """Of local segments in the newest step, as the host has read them."""
        return {segment: row["loss"] for segment, row in self._read.items() if "loss" in row}

    def _judge(self) -> dict[int, str]:
        """The segments that must not be updated, and why. The one time in a step that the host
        waits for the device; what the reports need is read on the same occasion."""
        rate = self.get_lr()[0]
        self._read = {
            segment: {"lr": rate * self._rate_factor(segment)}
            for segment in self.module.local_segments
        }
        wanted = [
            (segment, name, value)
            for name, values in (
                ("loss", self.segment_losses),
                ("grad_norm", self._grad_norms),
                ("router_loss", {s: mean for s, (mean, _) in self.executor.router_losses.items()}),
            )
            for segment, value in values.items()
        ]
        learning, self._learning = self._learning, ()
        used = [self._used] if learning else []
        numbers = torch.cat([*(v.view(1) for *_, v in wanted), *used, self._flags]).tolist()
        for (segment, name, _), number in zip(wanted, numbers, strict=False):
            self._read[segment][name] = number
        for parameter, one in zip(learning, numbers[len(wanted) :], strict=False):
            if not one:
                parameter.grad = None
        if learning:
            for segment in [s for s in self._grad_norms if not self._has_gradient(s)]:
                del self._grad_norms[segment], self._read[segment]["grad_norm"]
        return self.executor.watch.judge(numbers[len(wanted) + len(learning) :])

    def _has_gradient(self, segment: int) -> bool:
        return any(parameter.grad is not None for parameter in self._weights[segment])
