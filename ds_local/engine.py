"""`LocalPipelineEngine`: DeepSpeed's pipeline engine, driven by the route table.

Each optimizer step the engine turns its stage's part of the `Schedule` into DeepSpeed instructions and executes them. Between
steps it waits for nobody: there is no collective over stages on the step path. What DeepSpeed computes over all stages (the
gradient norm, the overflow flag, the loss) is computed per stage instead, and figures of other stages ride along with the
activations. Stages meet only to evaluate and to save.

Gradients are accumulated by plain autograd passes, scaled here: DeepSpeed's own scaling by accumulation steps never applies.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ds_local import checkpoint, codecs, instructions
from ds_local.blocks import config_dict
from ds_local.checkpoint import CheckpointError
from ds_local.copies import Copies, refresh_delay
from ds_local.diagnostics import probe_schedules
from ds_local.instructions import StageSchedule
from ds_local.metrics import Reports, Traffic, monitor_listener
from ds_local.module import LocalPipelineModule
from ds_local.notices import first_failure, post_notice, read_notice, report_failure
from ds_local.profiling import Recorder
from ds_local.replacements import ENGINES, SafeCheckpointEngine, StageLocal
from ds_local.replicas import Together
from ds_local.schedule import Link, Schedule, validate
from ds_local.seeds import seeded
from ds_local.subnets import saved_scaling
from ds_local.tensors import combine, floating, map_tensors, narrow, pack, split_batch, to_device, unpack, widen
from ds_local.transport import End, Sender, Tag, TransportError, make_end
from ds_local.weight_gradients import PutOff, catch_up, left_out, put_off


@dataclass
class _Live:
    """What a segment keeps of a micro-batch between its forward and its last pass."""

    inputs: Any
    labels: Any
    outputs: Any = None
    gradients: dict[int, list[Tensor]] = field(default_factory=dict)  # loss -> gradient at the outputs
    passed_on: list[Tensor] = field(default_factory=list)  # gradient at the inputs, to be sent
    passes_left: int = 0


class LocalPipelineEngine(PipelineEngine):
    """Trains a `LocalPipelineModule`. Use `start.initialize` to make one.

    `train_batch` returns this stage's own loss (the mean over the step's micro-batches, and over replicas unless they train
    apart) and never waits for another stage, or None where the routes give this stage no loss. `segment_losses` holds the loss
    of each local segment.
    """

    module: LocalPipelineModule
    data_iterator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ENGINES.add(self)
        self.section = self.module.section
        self.num_segments = self.module.num_segments
        self.replica_id = self.grid.get_data_parallel_id()
        self.segment_losses: dict[int, Tensor] = {}
        self.eval_losses: dict[int, float] = {}
        self.should_stop = False  # every rank is to leave its loop after this step; see `request_stop`
        self._stop_requested = False
        self.recorder: Recorder | None = None  # set it to keep a trace
        self._keep_output: Callable[[int, Any], None] | None = None
        self.replicas = Together()  # `start.initialize` puts here what the config asks for
        self._live: dict[tuple[int, int], _Live] = {}
        self._put_off: dict[tuple[int, int, int], PutOff] = {}  # (segment, micro-batch, pass)
        self._batch: dict[int, tuple[Any, Any]] = {}
        self._grad_norms: dict[int, Tensor] = {}
        self.checkpoint_engine = SafeCheckpointEngine(self._config)
        self._keep_norms_local()
        self._scale_by_segment()
        self._ends: dict[str, End | None] = {}  # name of each link of the model -> this rank's end of it
        self._schedules: dict[Any, StageSchedule] = {}
        self._schedule: StageSchedule  # the one that runs
        self.activation_links, self.gradient_links = self._make_links()
        self.copies = self._make_copies()
        last = self.grid._topo.get_rank(pipe=self.num_stages - 1, data=0)
        own = self.module.local_segments if self.replica_id == 0 else range(0)
        names = list(self._ends)
        self.reports = Reports(self.num_segments, self.section.segments_per_stage, self.steps_per_print(), last, own, names)
        self._traffic = Traffic(list(self._ends.values()))
        if self.global_rank == 0 and self.monitor.enabled:
            self.reports.listeners.append(monitor_listener(self.monitor, self.train_batch_size()))

    # --- what DeepSpeed would do over all stages ------------------------------------------------------------------------

    def _keep_norms_local(self) -> None:
        """Clip and check overflow per stage: the reductions over all stages would bring the bubble back at every step."""
        local = StageLocal(self.grid)
        if hasattr(self.optimizer, "mpu"):
            self.optimizer.mpu = local
        if hasattr(self.optimizer, "model_parallel_group"):  # ZeRO reads these once, at construction
            self.optimizer.model_parallel_group = None
            self.optimizer.model_parallel_world_size = 1
            self.optimizer.model_parallel_rank = 0

    def _scale_by_segment(self) -> None:
        """Learning rates of the config's factors, in the parameter groups by segment that `start.initialize` made."""
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
        """Clip each segment by its own gradient norm. DeepSpeed's version takes stage 0's norm for all stages."""
        for segment in self.module.local_segments:
            parameters = list(self.module.segment_parameters(segment))
            limit = self.gradient_clipping() * self.section.clip_multiplier(segment)
            self._grad_norms[segment] = torch.nn.utils.clip_grad_norm_(parameters, limit)

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        return grad  # losses are scaled where they are computed

    def _report_progress(self, step: int) -> None:
        pass  # `metrics.py` reports all stages in one line

    # --- links ----------------------------------------------------------------------------------------------------------

    def _make_links(self) -> tuple[dict[int, Any], dict[Link, Any]]:
        """All links of this rank: by lower segment for activations, by `Link` for gradients. A collective call."""
        schedules = self.section.distinct_schedules(self.num_stages, self.micro_batches)
        validate(schedules, self.section.link.depth)
        schedules += probe_schedules(self.section, self.num_stages) if self.section.diagnostics else []
        sent = {schedule.sends(action) for schedule in schedules for action in schedule.actions()}
        gradient_links = {link for link in sent if link is not None and link.kind == "gradient"}
        activations = {lower: self._make_link(Link("activation", lower)) for lower in range(self.num_segments - 1)}
        return activations, {link: self._make_link(link) for link in sorted(gradient_links)}

    def _make_link(self, link: Link) -> End | None:
        source, target = (link.lower, link.lower + 1) if link.kind == "activation" else (link.lower + 1, link.lower)
        return self._make_end(str(link), source, target, self.section.link.depth)

    def _make_copies(self) -> Copies:
        head, depth = self.section.head, self.section.link.depth
        delay = refresh_delay(self.num_segments, self.micro_batches, depth)
        return Copies(self.module.copies, self.module.copied_tensors, self._make_end, head.refresh_every, delay, head.tracking)

    def _make_end(self, name: str, source: int, target: int, depth: int) -> End | None:
        """This rank's end of a link between two segments. A collective call."""
        per_stage = self.section.segments_per_stage
        get_rank = self.grid._topo.get_rank
        ranks = [
            [get_rank(pipe=stage, data=replica) for stage in range(self.num_stages)] for replica in range(self.dp_world_size)
        ]
        link, stages = self.section.link, (source // per_stage, target // per_stage)
        end = make_end(name, self.stage_id, *stages, ranks, depth, link.timeout_seconds, self.device, link.past_host)
        self._ends[name] = end
        return end

    def _links(self) -> list[End]:
        return [end for end in self._ends.values() if end is not None]

    # --- a step ---------------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Any = None) -> Tensor | None:
        """One optimizer step.

        Args:
            data_iter: yields micro-batches `(inputs, labels)`; read on the first stage only, others may pass None.

        Returns:
            This stage's loss, a scalar tensor; None when the routes give this stage no loss in this step.

        Raises:
            TransportError: when a neighbour is gone or silent; RuntimeError when the data runs out.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() needs gradients enabled; use eval_batch() to evaluate")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        started = time.perf_counter()
        self._traffic.begin(self.replicas)
        self.segment_losses = {}
        with self._failures_reported():
            self._look_for_stop()
            self.copies.take(self.global_steps)
            self._exec_schedule(self._train_schedule())
            self.replicas.after_step()
            self.copies.send(self.global_steps)
        traffic = self._traffic.end(self.replicas)
        self.reports.close_step({
            segment: {
                "step": self.global_steps, "loss": self.segment_losses.get(segment), "seconds": time.perf_counter() - started,
                "grad_norm": self._grad_norms.get(segment, self.get_global_grad_norm()), **traffic,
            }
            for segment in self.module.local_segments
        })  # fmt: skip
        with_loss = [self.segment_losses[s] for s in self.module.local_segments if s in self.segment_losses]
        return with_loss[-1] if with_loss else None

    def _exec_schedule(self, pipe_schedule: StageSchedule) -> None:
        self._schedule = pipe_schedule
        for group in pipe_schedule:
            for instruction in group:
                run = partial(self._INSTRUCTION_MAP[type(instruction)], self, **instruction.kwargs)
                if self.recorder is None:
                    run()
                else:
                    self.recorder.record(instruction.name, self.global_steps, run)

    def run_without_step(self, schedule: Schedule, micro_batch: Any, keep: Callable[[int, Any], None]) -> None:
        """Run a schedule of one micro-batch, and leave the gradients where they arise; used between steps.

        Args:
            micro_batch: as `train_batch` reads it, on the first stage.
            keep: called with each local segment and its output.
        """
        iterator, self.data_iterator = self.data_iterator, iter([micro_batch])
        losses, self.segment_losses = self.segment_losses, {}
        self._keep_output = keep
        self.module.train()
        try:
            with self._failures_reported():
                self._exec_schedule(StageSchedule(schedule, self.stage_id, with_step=False))
        finally:
            self._keep_output = None
            self.data_iterator, self.segment_losses = iterator, losses

    def _train_schedule(self) -> StageSchedule:
        key = self.section.schedule_key(self.global_steps), self.micro_batches
        if key not in self._schedules:
            whole = self.section.schedule_at(self.global_steps, self.num_stages, self.micro_batches)
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
        others = ", ".join(f"rank {rank}" for rank in self.grid.dp_group if rank != self.global_rank)
        return TransportError(
            f"stage {self.stage_id} lost a replica ({others or 'another stage while all met'} gone or silent){first_failure()}; "
            f"the process group said: {text.splitlines()[0][:200]}"
        )

    # --- stopping -------------------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask all ranks to leave their training loop at the same step, two steps from now at the latest.

        May be called on any rank, from a signal handler too. Every rank learns of it as `should_stop` after a `train_batch`.
        """
        self._stop_requested = True

    def _look_for_stop(self) -> None:
        """Agree on the last step without a collective: rank 0 decides, stage 0 reads it, activations carry it onward.

        Rank 0 names the first step that no other rank of stage 0 can have begun: the next one, since replicas average their
        gradients at the end of every step, or that after the next exchange of replicas that train apart.
        """
        if self._stop_requested and self.global_rank != 0:
            post_notice("stop_requested", "yes")
        if self.stage_id != 0:
            return
        last = read_notice("stop_after")
        if last is None and self.global_rank == 0 and (self._stop_requested or read_notice("stop_requested")):
            alone = dist.get_world_size() == 1
            last = str(self.global_steps if alone else self.replicas.next_meeting(self.global_steps))
            post_notice("stop_after", last)
        self.should_stop = last is not None and self.global_steps >= int(last)

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None, save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:  # fmt: skip
        """Save everything a resumed run needs. All ranks must call it; stages meet here.

        The folder `save_dir/tag` appears complete or not at all (see `checkpoint.py`).

        Raises:
            CheckpointError: for a tag that is no plain file name.
        """
        tag = checkpoint.checked_tag(str(tag or f"global_step{self.global_steps}"))
        with self._failures_reported():
            partial = checkpoint.begin(save_dir, tag)
            self.copies.save(os.path.join(save_dir, partial), self.global_steps, self.replica_id)
            self.replicas.save(os.path.join(save_dir, partial))
            with self.replicas.whole(moments=True):
                super().save_checkpoint(save_dir, partial, client_state or {}, False, exclude_frozen_parameters)
            checkpoint.commit(save_dir, partial, tag, self._facts(), save_latest)
            self.reports.flush()
        return True

    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, load_module_strict: bool = True, load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any]]:  # fmt: skip
        """Load a checkpoint, by default the latest. All ranks must call it.

        Weights load into any number of stages; the optimizer's state only into the layout it was saved from
        (otherwise pass `load_module_only=True`).

        Returns:
            (path, client state).

        Raises:
            CheckpointError: when there is none, it is damaged, or the layout differs. Nothing has been changed by then.
        """
        tag = checkpoint.checked_tag(tag) if tag else checkpoint.latest_tag(load_dir)
        facts = checkpoint.verify(os.path.join(load_dir, tag))
        with_optimizer = load_optimizer_states and not load_module_only
        saved, own = checkpoint.layout(facts), checkpoint.layout(self._facts())
        if with_optimizer and saved != own:
            raise CheckpointError(f"{load_dir}/{tag} has {saved}, this run has {own}; keep the layout, or load weights only")
        scalings = [saved_scaling(f["local_parallel"], f["num_replicas"]) for f in (facts, self._facts())]
        if scalings[0] != scalings[1]:
            raise CheckpointError(
                f"{load_dir}/{tag} is of a merged model with the factor {scalings[0][0]:g} on its dealt-out parts, this run "
                f"gives them {scalings[1][0]:g}; keep replicas and their number, or export it and start from that folder"
            )
        self.copies.collect(self.global_steps)
        self.replicas.before_load()
        # DeepSpeed 0.19 writes the bf16 optimizer's shards to ZeRO files even without ZeRO, but does not look for them there
        unlooked_for = with_optimizer and self.using_bf16_optimizer and not self.zero_optimization()
        path, client_state = super().load_checkpoint(
            load_dir, tag, load_module_strict, load_optimizer_states and not unlooked_for, load_lr_scheduler_states,
            load_module_only, custom_load_fn,
        )  # fmt: skip
        if unlooked_for:
            self._load_zero_checkpoint(load_dir, tag)
        self.replicas.load(os.path.join(load_dir, tag) if with_optimizer else None, facts)
        self.copies.load(os.path.join(load_dir, tag) if with_optimizer else None, self.global_steps, self.replica_id)
        return path, client_state

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says about itself."""
        return {
            "step": self.global_steps, "num_stages": self.num_stages, "num_replicas": self.dp_world_size,
            "segment_parts": self.module.segment_parts, "head_segments": sorted(self.section.head_segments(self.num_segments)),
            "local_parallel": self.section.model_dump(mode="json"),
            "model": None if self.module.hf_config is None else config_dict(self.module.hf_config),
        }  # fmt: skip

    def destroy(self) -> None:
        """As DeepSpeed's, once what this stage has sent is taken."""
        for link in (one for one in self._links() if isinstance(one, Sender)):
            link.flush()
        super().destroy()

    # --- evaluation -----------------------------------------------------------------------------------------------------

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
            return_logits: also return what the last layer gives for the last micro-batch (None on other stages).
            num_micro_batches: micro-batches to read on each replica; default the accumulation steps.

        Returns:
            The model's own loss (scalar tensor, the same on all ranks): a mean over micro-batches and replicas, weighted by
            predicted tokens for language models. `eval_losses` holds the loss of every segment that has a head.
        """
        if reduce_output != "avg":
            raise ValueError(f'reduce_output must be "avg", got {reduce_output!r}')
        self.module.eval()
        train_iterator, self.data_iterator = self.data_iterator, data_iter
        sums = torch.zeros(2, self.num_segments, dtype=torch.float64, device=self.device)
        logits = None
        with torch.no_grad(), self._failures_reported(), self.replicas.whole():
            for micro_batch in range(self.micro_batches if num_micro_batches is None else num_micro_batches):
                for segment in self.module.local_segments:
                    logits = self._evaluate_segment(segment, -1 - micro_batch, sums, compute_loss, return_logits)
            dist.all_reduce(sums)
            self.reports.flush()
        self.data_iterator = train_iterator
        losses = (sums[0] / sums[1]).tolist()
        self.eval_losses = {segment: loss for segment, loss in enumerate(losses) if not math.isnan(loss)}
        loss = torch.tensor(losses[-1], device=self.device)
        return (loss, logits) if return_logits else loss

    def _evaluate_segment(self, segment: int, micro_batch: int, sums: Tensor, compute_loss: bool, return_logits: bool) -> Any:
        at = {"segment": segment, "micro_batch": micro_batch}
        if segment:
            self._exec_recv_activation(**at)
        else:
            self._exec_load_micro_batch(**at)
        live = self._live[segment, micro_batch]
        live.outputs = self.module.run_segment(segment, live.inputs)
        if segment + 1 < self.num_segments:
            self._exec_send_activation(**at)
        if compute_loss and self.module.has_loss(segment):
            weight = self.module.weight_of(live.labels)
            sums[0, segment] += self.module.loss_of(segment, live.outputs, live.labels) * weight
            sums[1, segment] += weight
        self._live.pop((segment, micro_batch), None)  # sending may have let go of it
        return self.module.logits_of(live.outputs) if return_logits and segment + 1 == self.num_segments else None

    # --- instructions ---------------------------------------------------------------------------------------------------

    def _exec_load_micro_batch(self, segment: int, micro_batch: int) -> None:
        try:
            batch = self._next_batch()
        except StopIteration:
            raise RuntimeError(
                f"the data ran out at micro-batch {micro_batch}; "
                "wrap the loader in deepspeed.utils.RepeatingLoader, or stop earlier"
            ) from None
        inputs, labels = split_batch(batch)
        self._live[segment, micro_batch] = _Live(to_device(inputs, self.device), to_device(labels, self.device))

    def _exec_recv_activation(self, segment: int, micro_batch: int) -> None:
        tag, message = self.activation_links[segment - 1].receive(Tag(self.global_steps, micro_batch))
        self.should_stop |= tag.last_step
        self.reports.figures[:segment] = message["figures"][:segment]
        self._live[segment, micro_batch] = _Live(*self.parts_of_message(message))

    def _exec_forward_pass(self, segment: int, micro_batch: int) -> None:
        live = self._live[segment, micro_batch]
        passes = self._routes(micro_batch).passes[segment]
        live.passes_left = len(passes)
        if any(one.sends is not None for one in passes):
            for tensor in floating(live.inputs):
                tensor.requires_grad_()
        with self._seeded("dropout", segment, micro_batch), torch.set_grad_enabled(bool(passes)):
            live.outputs = self.module.run_segment(segment, live.inputs)
        if self._keep_output is not None:
            self._keep_output(segment, live.outputs)

    def _seeded(self, purpose: str, segment: int, micro_batch: int) -> AbstractContextManager[None]:
        return seeded(self.section.seed, purpose, self.global_steps, micro_batch, self.replica_id, segment)

    def _exec_send_activation(self, segment: int, micro_batch: int) -> None:
        live = self._live[segment, micro_batch]
        tag = Tag(self.global_steps, micro_batch, self.should_stop)
        self.activation_links[segment].send(tag, self.message_for_next(segment, live.outputs, live.labels))
        self._release(segment, micro_batch)  # if no loss of this micro-batch trains the segment

    def message_for_next(self, segment: int, hidden: Any, labels: Any) -> dict[str, Tensor]:
        """What travels from `segment` to the next: hidden state, labels, and the figures of the segments so far."""
        link = self.section.link
        encoded = codecs.encode(pack("hidden", hidden), link.codec_above(segment), link)
        return encoded | pack("labels", narrow(labels)) | {"figures": self.reports.figures}

    @staticmethod
    def parts_of_message(message: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """(hidden, labels) of a message from the segment below."""
        message = codecs.decode(message)
        return unpack("hidden", message), widen(unpack("labels", message))

    def _exec_recv_grad(self, segment: int, micro_batch: int, loss: int) -> None:
        link = self.gradient_links[Link("gradient", segment, loss - segment)]
        _, message = link.receive(Tag(self.global_steps, micro_batch))
        self._live[segment, micro_batch].gradients[loss] = list(message.values())

    def _exec_send_grad(self, segment: int, micro_batch: int, loss: int) -> None:
        live = self._live[segment, micro_batch]
        link = self.gradient_links[Link("gradient", segment - 1, loss - (segment - 1))]
        link.send(Tag(self.global_steps, micro_batch), pack("gradient", tuple(live.passed_on)))
        live.passed_on = []
        self._release(segment, micro_batch)

    def _exec_gradient_pass(self, segment: int, micro_batch: int, which: int, split: bool) -> None:
        live = self._live[segment, micro_batch]
        one = self._routes(micro_batch).passes[segment][which]
        if any(loss == segment for loss, _ in one.reads) and segment not in live.gradients:
            self._run_head(segment, micro_batch, live)
        outputs = [tensor for tensor in floating(live.outputs) if tensor.requires_grad]
        gradients = combine([(live.gradients[loss], coefficient) for loss, coefficient in one.reads])
        live.passes_left -= 1
        keep_graph = live.passes_left > 0
        inputs = [tensor for tensor in floating(live.inputs) if tensor.requires_grad]
        passed_on: list[Any] = []
        if not one.weights:
            with left_out():
                passed_on = list(torch.autograd.grad(outputs, inputs, gradients, retain_graph=keep_graph))
        elif outputs:
            with put_off() if split else nullcontext() as later:
                torch.autograd.backward(outputs, gradients, retain_graph=keep_graph)
            if later is not None:
                self._put_off[segment, micro_batch, which] = later
            passed_on = [tensor.grad for tensor in inputs]
            for tensor in inputs:
                tensor.grad = None
        if one.sends is None:
            self._release(segment, micro_batch)
        else:
            live.passed_on = [g if one.send_scale == 1.0 else g * one.send_scale for g in passed_on]

    def _exec_weight_gradient(self, segment: int, micro_batch: int, which: int) -> None:
        catch_up(self._put_off.pop((segment, micro_batch, which)))

    def _run_head(self, segment: int, micro_batch: int, live: _Live) -> None:
        """Loss, gradients of the head's own parameters, and the loss's gradient at the segment's output.

        The head works on a detached copy of the output, so it learns only from its own loss, and its logits are gone before
        the segment's own backward pass starts.
        """
        hidden = map_tensors(live.outputs, lambda t: t.detach().requires_grad_(t.is_floating_point()))
        with self._seeded("head", segment, micro_batch):
            loss = self.module.loss_of(segment, hidden, live.labels)
        scale = self._routes(micro_batch).loss_weights[segment] / self.micro_batches
        torch.autograd.backward(loss * scale)
        live.gradients[segment] = [tensor.grad for tensor in floating(hidden) if tensor.grad is not None]
        self.segment_losses[segment] = self.segment_losses.get(segment, 0.0) + loss.detach() / self._schedule.num_losses[segment]

    def _release(self, segment: int, micro_batch: int) -> None:
        if not self._live[segment, micro_batch].passes_left:
            del self._live[segment, micro_batch]

    def _exec_reduce_grads(self) -> None:
        """Average gradients and losses over the replicas of this stage, unless they train apart."""
        if not self.replicas.reduces_gradients or (not self.is_data_parallel and not self.zero_optimization()):
            return
        # DeepSpeed fills in zeros for parameters without a gradient; an optimizer would decay a head that is not in use
        unused = [p for p in self.module.parameters() if p.requires_grad and p.grad is None]
        super()._exec_reduce_grads()
        if not self.zero_optimization() and not self.using_bf16_optimizer:
            for parameter in unused:
                parameter.grad = None
        if self.is_data_parallel and self.segment_losses:
            losses = torch.stack([loss.float() for loss in self.segment_losses.values()])
            dist.all_reduce(losses, group=self.grid.get_data_parallel_group())
            self.segment_losses = dict(zip(self.segment_losses, losses / self.dp_world_size, strict=True))

    def _routes(self, micro_batch: int) -> Any:
        return self._schedule.whole.rows[micro_batch]

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        instructions.LoadMicroBatch: _exec_load_micro_batch,
        instructions.RecvActivation: _exec_recv_activation,
        instructions.ForwardPass: _exec_forward_pass,
        instructions.SendActivation: _exec_send_activation,
        instructions.RecvGrad: _exec_recv_grad,
        instructions.GradientPass: _exec_gradient_pass,
        instructions.SendGrad: _exec_send_grad,
        instructions.WeightGradient: _exec_weight_gradient,
        instructions.ReduceGrads: _exec_reduce_grads,
    }
