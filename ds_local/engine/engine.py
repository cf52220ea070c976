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
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.schedule import ReduceGrads
from torch import Tensor

from ds_local.engine import instructions, loading, saving
from ds_local.engine.async_saves import AsyncSaves
from ds_local.engine.connections import Connections
from ds_local.engine.deepspeed_seam import ENGINES, always_check_overflow
from ds_local.engine.evaluation import evaluate, mean_losses
from ds_local.engine.executor import Executor
from ds_local.engine.finite import KINDS, Events
from ds_local.engine.instructions import StageSchedule
from ds_local.engine.loaders import begun, iterator_of
from ds_local.engine.module import LocalPipelineModule
from ds_local.engine.monitors import Points, take_monitor
from ds_local.engine.recorder import Recorder
from ds_local.engine.reports import Reports, Traffic
from ds_local.engine.stash import Stash
from ds_local.engine.stopping import Stopping
from ds_local.engine.unit_links import UnitLinks, WholePipeline
from ds_local.engine.unit_steps import UnitSteps
from ds_local.errors import CheckpointError, ConfigError, TransportError
from ds_local.links import notices
from ds_local.links.device import peak_memory
from ds_local.links.failures import Failures, meeting
from ds_local.links.groups import second_world
from ds_local.links.line import StepVoid
from ds_local.links.pair import Receiver, Sender
from ds_local.links.watchdog import Watchdog
from ds_local.replicas.group import replica_group
from ds_local.replicas.head_copies import Copies, refresh_delay
from ds_local.replicas.sync import Together
from ds_local.schedules.replay import validate
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Link, Schedule


def _by_executor(method: str) -> Callable[..., None]:
    return lambda engine, **at: getattr(engine.executor, method)(**at)


class LocalPipelineEngine(UnitSteps):
    """Trains a `LocalPipelineModule`. Use `initialize.initialize` to make one.

    `train_batch` returns this stage's own loss (the mean over the step's micro-batches, and over
    replicas unless they train apart) and never waits for another stage. `segment_losses` holds the
    loss of each local segment that has one, `has_loss` says whether there is any.
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
        self._look_after_each_other()
        self.recorder: Recorder | None = None  # set it to keep a trace
        self.replicas = Together()  # `initialize` puts here what the config asks for
        self._grad_norms: dict[int, Any] = {}  # by segment, where DeepSpeed's is of a stage
        self._one_by_one = not self.zero_optimization() and not self.using_bf16_optimizer
        alone = self.section.replicas.sync != "gradients" and self.is_data_parallel
        self.events = Events(
            self.section.on_nonfinite.skip,
            self.module.stage,
            self.replica_id if alone else None,
            speaks=alone or self.replica_id == 0,
        )
        self.events.tell = self._tell_event
        self.use_safe_checkpoints()
        self.name_files_by(self.module.stage)
        self.saves = AsyncSaves(second_world()) if self.section.async_save else None
        if hasattr(self.optimizer, "refresh_fp32_params"):
            # the optimizer steps from fp32 copies; those of a checkpoint come later, with its state
            self.module.on_load.append(self.optimizer.refresh_fp32_params)
        self.keep_norms_local()
        always_check_overflow(self.optimizer)
        self._prepare_updates()
        self.plan = RunPlan.of(self.section, self.module.pipeline_stages, self.micro_batches)
        self._schedules: dict[Any, StageSchedule] = {}
        self._last_step: int | None = None
        unit, link = self.module.unit, self.section.link
        self.units = WholePipeline()
        if unit is not None:
            self.units = UnitLinks(
                unit, link, self.device, self.request_stop, self._notices, self._number
            )
        self.connections = self._connect()
        self.groups = self.connections.groups
        self.activation_links, self.gradient_links = self._make_links()
        self.copies = self._make_copies()
        self._make_reports_and_executor()
        self._traffic = Traffic(list(self.connections.ends.values()))
        monitor = take_monitor(self.monitor) if self.global_rank == 0 else None
        self.points = Points(monitor, self.train_batch_size(), self.module.stage_of)
        self.reports.listeners.append(self.points.trained)

    def _make_reports_and_executor(self) -> None:
        own = self.module.local_segments if self.replica_id == 0 else []
        here = self.module.segments_of(self.module.stages_here)
        self.reports = Reports(
            self.module.stage_of,
            self.steps_per_print(),
            self.rank_of(self.module.stage_of[here[-1]] - self.module.stages_here.start, 0),
            own,
            list(self.connections.ends),
            self.groups,
            self.section.link.wait_seconds,
            self.plan.steps_ahead,
            here,
        )
        self.executor = Executor(
            self.module,
            self.section,
            self.device,
            self.replica_id if self.module.unit is None else self.module.unit.replica,
            self.activation_links,
            self.gradient_links,
            self.reports.figures,
            Stash({s: list(self.module.layer_parameters(s)) for s in self.module.local_segments}),
            self._replica_mean(),
        )
        self.executor.on_figures = self.reports.note

    def _look_after_each_other(self) -> None:
        """What the ranks of this engine tell each other beside the steps."""
        self._notices = notices.current()
        number = self._number = 1 if self._notices is None else next(self._notices.numbers)
        stages = map(self.stage_of, range(dist.get_world_size()))
        first = self.module.stages_here.start
        names = [f"stage {first + stage} (rank {rank})" for rank, stage in enumerate(stages)]
        self.failures = Failures(self._notices, number, names.__getitem__)
        first_ranks = [self.rank_of(0, replica) for replica in range(self.dp_world_size)]
        self._stopping = Stopping(self._notices, number, first_ranks)
        # the notices must not keep the engine, and its links, alive
        heard: list[dict[str, Any]] = []
        self._last_events = heard
        self._event_topic = f"nonfinite/{number}"
        if self._notices is not None:
            self._notices.answer(self._event_topic, lambda told: heard.append(told["event"]))
        self.watchdog: Watchdog | None = None
        if self._notices is not None:
            warn_seconds, chores = self.section.link.warn_seconds, [self._stopping.arrange]
            if self.module.unit is not None:
                chores.append(self._tell_units)
            self.watchdog = Watchdog(self._notices, self.failures.name, warn_seconds, chores)
            weakref.finalize(self, self.watchdog.stop).atexit = False

    # --- links ------------------------------------------------------------------------------------

    def _connect(self) -> Connections:
        """With the ranks next to this one; schedules are proven before."""
        validate(self.plan.schedules, self.section.link.depth)
        stages, replicas = range(self.num_stages), range(self.dp_world_size)
        return Connections(
            self.module.stage_of,
            self.module.stage,
            self.replica_id,
            [[self.rank_of(stage, replica) for stage in stages] for replica in replicas],
            self.device,
            self.section.link,
            self.module.stages_here,
            self.units.make_end,
        )

    def _make_links(self) -> tuple[dict[int, Any], dict[Link, Any]]:
        """All links of this rank: by lower segment for activations, by `Link` for gradients."""
        make = self.connections.make_link
        activations = {n: make(Link("activation", n)) for n in range(self.num_segments - 1)}
        for end in activations.values():
            if isinstance(end, Receiver):
                end.steps_ahead = self.plan.steps_ahead
        return activations, {link: make(link) for link in self.plan.gradient_links}

    def _make_copies(self) -> Copies:
        head, depth = self.section.head, self.section.link.depth
        delay = refresh_delay(self.num_segments, self.micro_batches, depth)
        delay += self.plan.steps_ahead
        return Copies(
            self.module.copies,
            self.module.copied_tensors,
            self.connections.make_end,
            head.refresh_every,
            delay,
            head.tracking,
        )

    def _replica_mean(self) -> Callable[[float], float]:
        """The mean of a number over the replicas of a stage that average gradients. A collective
        call."""
        section = self.section
        together = self.is_data_parallel and section.replicas.sync == "gradients"
        if section.loss_weighting != "token" or not together:
            return float
        group = replica_group(self)
        return lambda number: group.average([torch.tensor([number], dtype=torch.float64)])[0].item()

    # --- a step -----------------------------------------------------------------------------------

    def train_batch(self, data_iter: Any = None) -> Tensor:
        """One optimizer step.

        Args:
            data_iter: yields micro-batches, `(inputs, labels)` or a collator's dict (`batches.py`);
                read on the first stage only, others may pass None.

        Returns:
            This stage's loss, a scalar tensor: that of its last segment that has one; zero, not
            NaN, where the routes give it none in this step (`has_loss` is False then). NaN is a
            loss that came out so.

        Raises:
            TransportError: when a neighbour is gone or silent.
            NonFiniteError: after more steps in a row that are not finite than "on_nonfinite"
                allows.
            OutOfData: when the data runs out; one process may go on, with another iterator.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "train_batch() needs gradients enabled; use eval_batch() to evaluate"
            )
        if data_iter is not None:
            self.set_dataiterator(iterator_of(data_iter))
        self.module.train()
        started = time.perf_counter()
        self._traffic.begin(self.replicas)
        with self._failures_reported(f"step {self.global_steps + 1}"):
            schedule = self._schedule_of_step()
            self._see_whether_to_stop(schedule.whole)
            self.copies.take(self.global_steps)
            with self._whole_step():
                self._run_or_leave_out(schedule)
            self.executor.finish()
            self.replicas.after_step()
            self.copies.send(self.global_steps)
            traffic = self._traffic.end(self.replicas)
            traffic["seconds"] = time.perf_counter() - started
            own = self.module.local_segments
            self.reports.close_step({segment: self._figures(segment) | traffic for segment in own})
            self.events.check()
            self.units.done(self.global_steps)
            self._admit()
        return self.own_loss

    def _figures(self, segment: int) -> dict[str, Any]:
        """Of the step that ends, but for its traffic."""
        kind, event = self.events.newest.get(segment, (None, None))
        return {
            "step": self.global_steps,
            "grad_norm": self._grad_norms.get(segment),
            "memory_bytes": peak_memory(self.device),
            "nonfinite": None if kind is None else KINDS.index(kind),
            "nonfinite_step": event,
            "skipped": self.skipped_steps,
            **self._read[segment],
        }

    def _run(self, pipe_schedule: StageSchedule, data: Iterator[Any]) -> None:
        step = self.global_steps
        self.executor.begin(step, pipe_schedule.whole, data)
        for group in pipe_schedule:
            if self.executor.is_too_late(group[0].kwargs.get("ahead", 0)):
                continue
            for instruction in group:
                run = partial(self.run_instruction, instruction)
                if self.recorder is None:
                    run()
                else:
                    self.recorder.record(instruction.name, step, run)

    def _batches(self) -> Iterator[Any]:
        """Micro-batches of the data iterator, through DeepSpeed's `set_batch_fn`."""
        return iter(self.next_batch, object())

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
        whole = StageSchedule(schedule, self.module.stage, with_step=False)
        try:
            with self._failures_reported("a probe"):
                self._run(whole, iter([micro_batch]))
        finally:
            self.executor.keep_output = None
            self.segment_losses = losses

    def _schedule_of_step(self) -> StageSchedule:
        executor, step = self.executor, self.global_steps
        # the caller goes on all the same
        if executor.stop_after is not None and step > executor.stop_after:
            executor.stop_after = None
        if executor.data_end is not None and step > executor.data_end:
            executor.data_end = None
        if self.plan.num_micro_batches != self.micro_batches:  # `set_train_batch_size` was called
            self._change_plan()
        executor.phase_end = self._last_planned(step)
        is_first = not executor.stash.under_way
        key = self.plan.key_at(step), is_first
        if key not in self._schedules:
            whole = self.plan.schedule_at(step).at(is_first)
            self._schedules[key] = StageSchedule(whole, self.module.stage)
            self.kept_buffers.watch()
        return self._schedules[key]

    def _change_plan(self) -> None:
        if self.executor.stash.under_way:
            raise ConfigError(
                "set_train_batch_size() was called while forwards run ahead; call it where a phase "
                "or the run ends, or leave local_parallel.run_ahead out"
            )
        self.plan = RunPlan.of(self.section, self.module.pipeline_stages, self.micro_batches)
        self._schedules.clear()

    def _last_planned(self, step: int) -> int | None:
        """The last step that forwards may run ahead to: of the phase, or of the run."""
        ends = [self.section.last_of_phase(step), self._last_step]
        return min((end for end in ends if end is not None and end >= step), default=None)

    def starts_afresh_at(self, step: int) -> bool:
        """Does nothing run ahead to this step, because a phase begins there?"""
        return step == 0 or self.section.last_of_phase(step - 1) == step - 1

    def ends_after(self, steps: int | None) -> None:
        """Say after how many optimizer steps the run ends, so that nothing runs ahead of its last
        one. Call it on all ranks, before the steps that would; None: not known.

        A run that is not told ends well too, with some forwards computed for nothing.
        """
        self._last_step = None if steps is None else steps - 1

    def _see_whether_to_stop(self, schedule: Schedule) -> None:
        """On the first stage: a request to stop goes with the first step of which all messages, or
        the last ones, are still to be sent. Other units have handed it on to the one below."""
        if not self.reads_data or self.executor.stop_after is not None:
            return
        step, last = self.global_steps, self.executor.last_of_stretch
        if schedule.leads and not schedule.is_first:
            step += schedule.leads[0] // schedule.num_micro_batches
        if (last is None or step <= last) and self._stopping.is_last(step):
            self.executor.stop_after = step

    @contextmanager
    def _failures_reported(self, what: str) -> Iterator[None]:
        """Others see what this rank is in. Tells every rank why this one ends, then lets the error
        go on."""
        try:
            with self.meeting(what):
                yield
        except CheckpointError:
            raise  # all ranks have it, and have lost nothing
        except BaseException as failure:
            where = f"{self.failures.name(self.global_rank)} at step {self.global_steps}"
            reason = self.failures.report_error(failure, where)
            for link in self.connections.own:
                if isinstance(link, Sender):
                    link.fail(reason)
            raise

    @property
    def last_event(self) -> dict[str, Any] | None:
        """What was not finite, if that ends the run."""
        return self._last_events[-1] if self._last_events else None

    def _tell_event(self, event: dict[str, Any]) -> None:
        self._last_events.append(event)
        if self._notices is not None:
            self._notices.ask_all(self._event_topic, event=event)

    def meeting(self, what: str) -> AbstractContextManager[None]:
        """Around collectives of all ranks: a wait in them is limited by `link.timeout_seconds`, and
        a `TransportError` names who is missing.

        Args:
            what: for messages, as in "the save after step 10".
        """
        return meeting(what, self.failures)

    # --- stopping -------------------------------------------------------------------------------

    @property
    def segment_losses(self) -> dict[int, Tensor]:
        """The loss of each local segment in the newest step."""
        return self.executor.losses

    @segment_losses.setter
    def segment_losses(self, losses: dict[int, Tensor]) -> None:
        self.executor.losses = losses

    @property
    def has_loss(self) -> bool:
        """Did the routes give this stage a loss in the newest step?"""
        return bool(self.segment_losses)

    @property
    def should_stop(self) -> bool:
        """Every rank is to leave its loop after this step; see `request_stop`."""
        return self.executor.run_ends

    def request_stop(self) -> None:
        """Ask all ranks to leave their training loop at the same step, two steps from now at the
        latest, or two steps later than forwards have run ahead. An evaluation that is under way
        ends early, with what it has seen.

        May be called on any rank, from a signal handler too. Every rank learns of it as
        `should_stop`, after a `train_batch`, an `eval_batch` or a `save_checkpoint`.
        """
        self._stopping.requested = True
        self.units.stop_soon()

    def _agree_to_stop(self) -> None:
        """Where all meet anyway a request needs no further step. A collective call. Units meet
        nowhere, so there it goes with the messages of a step."""
        pending = self.module.unit is None and self._stopping.pending
        asked = torch.tensor(float(self.should_stop or pending), device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.executor.run_ends = bool(asked)

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

        With `local_parallel.async_save` it returns when what is to be saved is copied to host
        memory, and waits first for the save before; `wait_for_save` tells when it is whole.

        Raises:
            SaveError: on all ranks, when the disk of one does not take it; training may go on.
            CheckpointError: for a tag that is no plain file name, or `client_state` that could not
                be loaded again.
        """
        client_state = client_state or {}

        def write(partial: str, state: Any) -> None:
            super(LocalPipelineEngine, self).save_checkpoint(
                save_dir, partial, state, False, exclude_frozen_parameters
            )

        with self._failures_reported(f"the save after step {self.global_steps}"):
            saving.save(self, write, save_dir, tag, client_state, save_latest)
            self._agree_to_stop()
        return True

    def wait_for_save(self) -> None:
        """Until an asynchronous save that is under way is whole, on all ranks. A collective call.

        Raises:
            SaveError: on all ranks, when the disk of one did not take it; training may go on.
        """
        if self.saves is not None:
            with self.meeting("the end of a save"):
                self.saves.wait()

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

        Any layout loads into any other: stages, replicas, segments, precision, ZeRO stage; `moved`
        says what changed.

        Returns:
            (path, client state).

        Raises:
            CheckpointError: when there is none, it is damaged, or of another model or optimizer.
                Nothing has been changed by then.
        """
        if self.saves is not None:
            self.saves.settle()
        if custom_load_fn is not None:
            raise CheckpointError(
                "custom_load_fn does not work here, where each stage reads files of its own; leave "
                "it out"
            )

        def read(found: str, with_optimizer: bool) -> tuple[str | None, dict[str, Any]]:
            return super(LocalPipelineEngine, self).load_checkpoint(
                load_dir,
                found,
                load_module_strict,
                with_optimizer,
                load_lr_scheduler_states,
                load_module_only,
            )

        with self.meeting("the loading of a checkpoint"):
            return loading.load(
                self,
                read,
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
            )

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
            data_iter: as for `train_batch`, or a loader to begin; of any shapes.
            return_logits: also return what the last layer gives for the last micro-batch (None on
                other stages).
            num_micro_batches: micro-batches to read on each replica; default the accumulation
                steps.

        Returns:
            The model's own loss (scalar tensor, the same on all ranks): a mean over micro-batches
            and replicas, weighted by predicted tokens for language models; zero where no position
            counts. `eval_losses` holds the loss of every segment that has one.
        """
        if reduce_output != "avg":
            raise ValueError(f'reduce_output must be "avg", got {reduce_output!r}')
        if num_micro_batches is not None and not (
            isinstance(num_micro_batches, int) and num_micro_batches > 0
        ):
            raise ValueError(
                f"num_micro_batches must be a number from 1 on, got {num_micro_batches!r}"
            )
        self.module.eval()
        train_iterator, self.data_iterator = self.data_iterator, begun(data_iter)
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        try:
            what = f"the evaluation after step {self.global_steps}"
            with torch.no_grad(), self._failures_reported(what), self.replicas.whole():
                self.executor.step = self.global_steps
                asked_before, self.executor.run_ends = self.executor.run_ends, False
                try:
                    sums, logits = evaluate(
                        self.executor,
                        self.module,
                        self._batches(),
                        count,
                        compute_loss,
                        return_logits,
                        stop=lambda: self._stopping.pending and not asked_before,
                    )
                except StepVoid:
                    self.executor.leave_out()
                    shape = 2, self.num_segments
                    sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
                    logits = None
                    self.units.leave_out(self.global_steps, trains=False)
                self.executor.run_ends |= asked_before
                dist.all_reduce(sums)
                self.reports.flush()
                self._agree_to_stop()
        finally:
            self.data_iterator = train_iterator
        self.eval_losses, own = mean_losses(sums)
        if not self.should_stop or asked_before:
            self.points.validated(self.global_steps, self.eval_losses)
        loss = torch.tensor(own, device=self.device)
        return (loss, logits) if return_logits else loss

    def reset_activation_shape(self) -> None:
        """Let go of the buffers of messages. Shapes may change without it: each message says its
        own where it differs from the one before."""
        super().reset_activation_shape()
        for link in self.connections.own:
            if isinstance(link, Sender):
                link.release()

    def destroy(self) -> None:
        """As DeepSpeed's, once what this stage has sent is taken. An engine that was refused while
        it was made has only the first of these parts."""
        made = vars(self)
        if (saves := made.get("saves")) is not None:
            saves.settle()
        if (watchdog := made.get("watchdog")) is not None:
            watchdog.stop()
        if (copies := made.get("copies")) is not None:
            with suppress(TransportError):  # the other end waits until all it has sent is taken
                copies.collect(self.global_steps)
        if (connections := made.get("connections")) is not None:
            for link in (one for one in connections.own if isinstance(one, Sender)):
                link.flush()
        super().destroy()

    INSTRUCTIONS: ClassVar[dict[type, Any]] = {
        **{
            instruction: _by_executor(method)
            for instruction, method in instructions.METHODS.items()
        },
        ReduceGrads: UnitSteps.reduce_gradients,
    }
