"""`LocalPipelineEngine`: DeepSpeed's pipeline engine, driven by the route table.

Each optimizer step the engine turns its stage's part of the `Schedule` into DeepSpeed instructions
and executes them. Between steps it waits for nobody: there is no collective over stages on the step
path. What DeepSpeed computes over all stages (the gradient norm, the overflow flag, the loss) is
computed per stage instead, and figures of other stages ride along with the activations. Stages meet
only to evaluate and to save.

Gradients are accumulated by plain autograd passes, scaled here: DeepSpeed's own scaling by
accumulation steps never applies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ds_local.engine import instructions, saving
from ds_local.engine.deepspeed_seam import ENGINES, SafeCheckpointEngine, StageLocal
from ds_local.engine.evaluation import evaluate, mean_losses
from ds_local.engine.executor import Executor
from ds_local.engine.instructions import StageSchedule
from ds_local.engine.module import LocalPipelineModule
from ds_local.engine.recorder import Recorder
from ds_local.engine.reports import Reports, Traffic, monitor_listener
from ds_local.engine.stopping import Stopping
from ds_local.errors import TransportError
from ds_local.links.notices import first_failure, report_failure
from ds_local.links.transport import End, Sender, make_end
from ds_local.replicas.head_copies import Copies, refresh_delay
from ds_local.replicas.sync import Together
from ds_local.schedules.replay import validate
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Link, Schedule


def _by_executor(method: str) -> Callable[..., None]:
    return lambda engine, **at: getattr(engine.executor, method)(**at)


class LocalPipelineEngine(PipelineEngine):
    """Trains a `LocalPipelineModule`. Use `initialize.initialize` to make one.

    `train_batch` returns this stage's own loss (the mean over the step's micro-batches, and over
    replicas unless they train apart) and never waits for another stage, or None where the routes
    give this stage no loss. `segment_losses` holds the loss of each local segment.
    """

    module: LocalPipelineModule
    data_iterator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ENGINES.add(self)
        self.section = self.module.section
        self.num_segments = self.module.num_segments
        self.replica_id = self.grid.get_data_parallel_id()
        self.eval_losses: dict[int, float] = {}
        self._stopping = Stopping(self.stage_id, self.global_rank)
        self.recorder: Recorder | None = None  # set it to keep a trace
        self.replicas = Together()  # `initialize` puts here what the config asks for
        self._grad_norms: dict[int, Tensor] = {}
        self.checkpoint_engine = SafeCheckpointEngine(self._config)
        self._keep_norms_local()
        self._scale_by_segment()
        self._ends: dict[
            str, End | None
        ] = {}  # name of each link of the model -> this rank's end of it
        self.plan = RunPlan.of(self.section, self.num_stages, self.micro_batches)
        self._schedules: dict[Any, StageSchedule] = {}
        self.activation_links, self.gradient_links = self._make_links()
        self.copies = self._make_copies()
        last = self.grid._topo.get_rank(pipe=self.num_stages - 1, data=0)
        own = self.module.local_segments if self.replica_id == 0 else range(0)
        names = list(self._ends)
        self.reports = Reports(
            self.num_segments,
            self.section.segments_per_stage,
            self.steps_per_print(),
            last,
            own,
            names,
        )
        self.executor = Executor(
            self.module,
            self.section,
            self.device,
            self.replica_id,
            self.activation_links,
            self.gradient_links,
            self.reports.figures,
        )
        self._traffic = Traffic(list(self._ends.values()))
        if self.global_rank == 0 and self.monitor.enabled:
            self.reports.listeners.append(monitor_listener(self.monitor, self.train_batch_size()))

    # --- what DeepSpeed would do over all stages
    # ------------------------------------------------------------------------

    def _keep_norms_local(self) -> None:
        """Clip and check overflow per stage: the reductions over all stages would bring the bubble
        back at every step."""
        local = StageLocal(self.grid)
        if hasattr(self.optimizer, "mpu"):
            self.optimizer.mpu = local
        if hasattr(
            self.optimizer, "model_parallel_group"
        ):  # ZeRO reads these once, at construction
            self.optimizer.model_parallel_group = None
            self.optimizer.model_parallel_world_size = 1
            self.optimizer.model_parallel_rank = 0

    def _scale_by_segment(self) -> None:
        """Learning rates of the config's factors, in the parameter groups by segment that
        `initialize` made."""
        if not self.section.scales_learning_rates:
            return
        kept: list[float] = []

        def scale(optimizer: Any, *_: Any) -> None:
            kept[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= self.section.lr_multiplier(group["segment"], self.global_steps)

        def restore(optimizer: Any, *_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = rate

        self.basic_optimizer.register_step_pre_hook(scale)
        self.basic_optimizer.register_step_post_hook(restore)

    def clip_fp32_gradients(self) -> None:
        """Clip each segment by its own gradient norm. DeepSpeed's version takes stage 0's norm for
        all stages."""
        for segment in self.module.local_segments:
            parameters = list(self.module.segment_parameters(segment))
            limit = self.gradient_clipping() * self.section.clip_multiplier(segment)
            self._grad_norms[segment] = torch.nn.utils.clip_grad_norm_(parameters, limit)

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        return grad  # losses are scaled where they are computed

    def _report_progress(self, step: int) -> None:
        pass  # `metrics.py` reports all stages in one line

    # --- links
    # ----------------------------------------------------------------------------------------------------------

    def _make_links(self) -> tuple[dict[int, Any], dict[Link, Any]]:
        """All links of this rank: by lower segment for activations, by `Link` for gradients. A
        collective call."""
        validate(self.plan.schedules, self.section.link.depth)
        activations = {
            lower: self._make_link(Link("activation", lower))
            for lower in range(self.num_segments - 1)
        }
        return activations, {link: self._make_link(link) for link in self.plan.gradient_links}

    def _make_link(self, link: Link) -> End | None:
        source, target = (
            (link.lower, link.lower + 1)
            if link.kind == "activation"
            else (link.lower + 1, link.lower)
        )
        return self._make_end(str(link), source, target, self.section.link.depth)

    def _make_copies(self) -> Copies:
        head, depth = self.section.head, self.section.link.depth
        delay = refresh_delay(self.num_segments, self.micro_batches, depth)
        return Copies(
            self.module.copies,
            self.module.copied_tensors,
            self._make_end,
            head.refresh_every,
            delay,
            head.tracking,
        )

    def _make_end(self, name: str, source: int, target: int, depth: int) -> End | None:
        """This rank's end of a link between two segments. A collective call."""
        per_stage = self.section.segments_per_stage
        get_rank = self.grid._topo.get_rank
        ranks = [
            [get_rank(pipe=stage, data=replica) for stage in range(self.num_stages)]
            for replica in range(self.dp_world_size)
        ]
        link, stages = self.section.link, (source // per_stage, target // per_stage)
        end = make_end(
            name,
            self.stage_id,
            *stages,
            ranks,
            depth,
            link.timeout_seconds,
            self.device,
            link.past_host,
        )
        self._ends[name] = end
        return end

    def _links(self) -> list[End]:
        return [end for end in self._ends.values() if end is not None]

    # --- a step
    # ---------------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Any = None) -> Tensor | None:
        """One optimizer step.

        Args:
            data_iter: yields micro-batches `(inputs, labels)`; read on the first stage only, others
                may pass None.

        Returns:
            This stage's loss, a scalar tensor; None when the routes give this stage no loss in this
            step.

        Raises:
            TransportError: when a neighbour is gone or silent; RuntimeError when the data runs out.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "train_batch() needs gradients enabled; use eval_batch() to evaluate"
            )
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        started = time.perf_counter()
        self._traffic.begin(self.replicas)
        with self._failures_reported():
            self.executor.last_step |= self._stopping.is_last(self.global_steps, self.replicas)
            self.copies.take(self.global_steps)
            self._exec_schedule(self._train_schedule(), self._batches())
            self.replicas.after_step()
            self.copies.send(self.global_steps)
        traffic = self._traffic.end(self.replicas)
        self.reports.close_step(
            {
                segment: {
                    "step": self.global_steps,
                    "loss": self.segment_losses.get(segment),
                    "seconds": time.perf_counter() - started,
                    "grad_norm": self._grad_norms.get(segment, self.get_global_grad_norm()),
                    **traffic,
                }
                for segment in self.module.local_segments
            }
        )
        with_loss = [
            self.segment_losses[s] for s in self.module.local_segments if s in self.segment_losses
        ]
        return with_loss[-1] if with_loss else None

    def _exec_schedule(self, pipe_schedule: StageSchedule, data: Iterator[Any]) -> None:
        step = self.global_steps
        self.executor.begin(step, pipe_schedule.whole, pipe_schedule.num_losses, data)
        for group in pipe_schedule:
            for instruction in group:
                run = partial(self._INSTRUCTION_MAP[type(instruction)], self, **instruction.kwargs)
                if self.recorder is None:
                    run()
                else:
                    self.recorder.record(instruction.name, step, run)

    def _batches(self) -> Iterator[Any]:
        """Micro-batches of the data iterator, through DeepSpeed's `set_batch_fn`."""
        return iter(self._next_batch, object())

    def run_without_step(
        self, schedule: Schedule, micro_batch: Any, keep: Callable[[int, Any], None]
    ) -> None:
        """Run a schedule of one micro-batch between steps; leave the gradients where they arise.

        Args:
            micro_batch: as `train_batch` reads it, on the first stage.
            keep: called with each local segment and its output.
        """
        self.module.train()
        losses, self.executor.keep_output = self.segment_losses, keep
        whole = StageSchedule(schedule, self.stage_id, with_step=False)
        try:
            with self._failures_reported():
                self._exec_schedule(whole, iter([micro_batch]))
        finally:
            self.executor.keep_output = None
            self.segment_losses = losses

    def _train_schedule(self) -> StageSchedule:
        if self.plan.num_micro_batches != self.micro_batches:  # `set_train_batch_size` was called
            self.plan = RunPlan.of(self.section, self.num_stages, self.micro_batches)
            self._schedules.clear()
        key = self.plan.key_at(self.global_steps)
        if key not in self._schedules:
            whole = self.plan.schedule_at(self.global_steps)
            self._schedules[key] = StageSchedule(whole, self.stage_id)
        return self._schedules[key]

    @contextmanager
    def _failures_reported(self) -> Iterator[None]:
        """Tell every stage why this one ends, then let the error go on."""
        try:
            yield
        except BaseException as error:
            failure = self._explained(error)
            reason = getattr(failure, "reason", None)
            if reason is None:
                what = str(failure) or type(failure).__name__
                reason = f"stage {self.stage_id} (rank {self.global_rank}) at step {self.global_steps}: {what}"
                report_failure(reason)
            for link in self._links():
                if isinstance(link, Sender):
                    link.fail(reason)
            if failure is error:
                raise
            raise failure from error

    def _explained(self, error: BaseException) -> BaseException:
        """A collective that broke does not say with whom; among replicas we can."""
        text = str(error)
        if (
            isinstance(error, TransportError)
            or not isinstance(error, RuntimeError)
            or not any(word in text for word in ("gloo/transport", "NCCL", "ProcessGroup"))
        ):
            return error
        others = ", ".join(
            f"rank {rank}" for rank in self.grid.dp_group if rank != self.global_rank
        )
        return TransportError(
            f"stage {self.stage_id} lost a replica ({others or 'another stage while all met'} gone or silent){first_failure()}; "
            f"the process group said: {text.splitlines()[0][:200]}"
        )

    # --- stopping -------------------------------------------------------------------------------

    @property
    def segment_losses(self) -> dict[int, Tensor]:
        """The loss of each local segment in the newest step."""
        return self.executor.losses

    @segment_losses.setter
    def segment_losses(self, losses: dict[int, Tensor]) -> None:
        self.executor.losses = losses

    @property
    def should_stop(self) -> bool:
        """Every rank is to leave its loop after this step; see `request_stop`."""
        return self.executor.last_step

    def request_stop(self) -> None:
        """Ask all ranks to leave their training loop at the same step, two steps from now at the
        latest.

        May be called on any rank, from a signal handler too. Every rank learns of it as
        `should_stop` after a `train_batch`.
        """
        self._stopping.requested = True

    # --- stages meet ----------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything a resumed run needs. All ranks must call it; stages meet here.

        Raises:
            CheckpointError: for a tag that is no plain file name.
        """

        def write(partial: str) -> None:
            super(LocalPipelineEngine, self).save_checkpoint(
                save_dir, partial, client_state or {}, False, exclude_frozen_parameters
            )

        with self._failures_reported():
            saving.save(self, write, save_dir, tag, save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load a checkpoint, by default the latest. All ranks must call it.

        Weights load into any number of stages; the optimizer's state only into the layout it was
        saved from (otherwise pass `load_module_only=True`).

        Returns:
            (path, client state).

        Raises:
            CheckpointError: when there is none, it is damaged, or the layout differs. Nothing has
                been changed by then.
        """

        def read(found: str, with_optimizer: bool) -> tuple[str | None, dict[str, Any]]:
            return super(LocalPipelineEngine, self).load_checkpoint(
                load_dir,
                found,
                load_module_strict,
                with_optimizer,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )

        return saving.load(self, read, load_dir, tag, load_optimizer_states, load_module_only)

    def eval_batch(
        self,
        data_iter: Any,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Every segment's loss without training. All ranks must call it; stages meet here.

        Args:
            data_iter: as for `train_batch`; shapes must be those of training.
            return_logits: also return what the last layer gives for the last micro-batch (None on
                other stages).
            num_micro_batches: micro-batches to read on each replica; default the accumulation
                steps.

        Returns:
            The model's own loss (scalar tensor, the same on all ranks): a mean over micro-batches
            and replicas, weighted by predicted tokens for language models. `eval_losses` holds the
            loss of every segment that has a head.
        """
        if reduce_output != "avg":
            raise ValueError(f'reduce_output must be "avg", got {reduce_output!r}')
        self.module.eval()
        train_iterator, self.data_iterator = self.data_iterator, data_iter
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        try:
            with torch.no_grad(), self._failures_reported(), self.replicas.whole():
                self.executor.step = self.global_steps
                sums, logits = evaluate(
                    self.executor, self.module, self._batches(), count, compute_loss, return_logits
                )
                dist.all_reduce(sums)
                self.reports.flush()
        finally:
            self.data_iterator = train_iterator
        self.eval_losses, own = mean_losses(sums)
        loss = torch.tensor(own, device=self.device)
        return (loss, logits) if return_logits else loss

    def destroy(self) -> None:
        """As DeepSpeed's, once what this stage has sent is taken."""
        for link in (one for one in self._links() if isinstance(one, Sender)):
            link.flush()
        super().destroy()

    def _exec_reduce_grads(self) -> None:
        """Average gradients and losses over the replicas of this stage, unless they train apart."""
        if not self.replicas.reduces_gradients or (
            not self.is_data_parallel and not self.zero_optimization()
        ):
            return
        # DeepSpeed fills in zeros for parameters without a gradient; an optimizer would decay a
        # head that is not in use
        unused = [p for p in self.module.parameters() if p.requires_grad and p.grad is None]
        super()._exec_reduce_grads()
        if not self.zero_optimization() and not self.using_bf16_optimizer:
            for parameter in unused:
                parameter.grad = None
        if self.is_data_parallel and self.segment_losses:
            losses = torch.stack([loss.float() for loss in self.segment_losses.values()])
            dist.all_reduce(losses, group=self.grid.get_data_parallel_group())
            self.segment_losses = dict(
                zip(self.segment_losses, losses / self.dp_world_size, strict=True)
            )

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        **{
            instruction: _by_executor(method)
            for instruction, method in instructions.METHODS.items()
        },
        instructions.ReduceGrads: _exec_reduce_grads,
    }
