"""`Executor`: runs a stage's instructions. Knows segments, links and autograd, and no DeepSpeed.

Gradients are accumulated by plain autograd passes, with losses scaled here. Everything is kept by
(segment, micro-batch), so segments of one stage and micro-batches under way never mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_local.config.schema import LocalParallelConfig
from ds_local.links.messages import (
    activation_message,
    combine,
    floating,
    map_tensors,
    pack,
    parts_of_activation,
    split_batch,
    to_device,
)
from ds_local.links.transport import End, Tag
from ds_local.model.seeds import seeded
from ds_local.model.split_linear import PutOff, catch_up, left_out, put_off
from ds_local.schedules.schedule import Link, Schedule


class Segments(Protocol):
    """What the executor asks of a model."""

    num_segments: int

    def run_segment(self, segment: int, inputs: Any) -> Any: ...

    def loss_of(self, segment: int, hidden: Any, labels: Any) -> Tensor: ...


@dataclass
class _Live:
    """What a segment keeps of a micro-batch between its forward and its last pass."""

    inputs: Any
    labels: Any
    outputs: Any = None
    gradients: dict[int, list[Tensor]] = field(default_factory=dict)  # loss -> at the outputs
    passed_on: list[Tensor] = field(default_factory=list)  # gradient at the inputs, to be sent
    passes_left: int = 0


class Executor:
    """One stage's instructions, each a method; `engine.py` maps DeepSpeed's to them.

    Args:
        segments: the model.
        section: the "local_parallel" section.
        device: where the stage computes.
        replica_id: of this copy of the stage; a part of the seeds of dropout.
        activation_links: by lower segment.
        gradient_links: by `Link`.
        figures: what rides along with activations, one row a segment; see `reports.py`.
    """

    def __init__(
        self,
        segments: Segments,
        section: LocalParallelConfig,
        device: torch.device,
        replica_id: int,
        activation_links: Mapping[int, End | None],
        gradient_links: Mapping[Link, End | None],
        figures: Tensor,
    ) -> None:
        self.segments, self.section = segments, section
        self.device, self.replica_id = device, replica_id
        self.activation_links: Mapping[int, Any] = activation_links
        self.gradient_links: Mapping[Link, Any] = gradient_links
        self.figures = figures
        self.step = 0
        self.last_step = False  # the run ends after this step; rides along with activations
        self.losses: dict[int, Tensor] = {}  # of this step, by segment
        self.live: dict[tuple[int, int], _Live] = {}
        self.keep_output: Callable[[int, Any], None] | None = None
        self._deferred: dict[tuple[int, int, int], PutOff] = {}  # (segment, micro-batch, pass)
        self._schedule: Schedule
        self._num_losses: Mapping[int, int] = {}
        self._data: Iterator[Any] = iter(())

    def begin(
        self, step: int, schedule: Schedule, num_losses: Mapping[int, int], data: Iterator[Any]
    ) -> None:
        """Get ready for a step.

        Args:
            num_losses: how many micro-batches compute the loss of each segment.
            data: micro-batches; read where the first segment is.
        """
        self.step, self._schedule, self._num_losses, self._data = step, schedule, num_losses, data
        self.losses = {}

    # --- forward --------------------------------------------------------------------------------

    def load_micro_batch(self, segment: int, micro_batch: int) -> None:
        try:
            batch = next(self._data)
        except StopIteration:
            raise RuntimeError(
                f"the data ran out at micro-batch {micro_batch}; wrap the loader in "
                "deepspeed.utils.RepeatingLoader, or stop earlier"
            ) from None
        inputs, labels = split_batch(batch)
        live = _Live(to_device(inputs, self.device), to_device(labels, self.device))
        self.live[segment, micro_batch] = live

    def recv_activation(self, segment: int, micro_batch: int) -> None:
        link = self.activation_links[segment - 1]
        tag, message = link.receive(Tag(self.step, micro_batch))
        self.last_step |= tag.last_step
        self.figures[:segment] = message["figures"][:segment]
        self.live[segment, micro_batch] = _Live(*parts_of_activation(message))

    def forward_pass(self, segment: int, micro_batch: int) -> None:
        live = self.live[segment, micro_batch]
        passes = self._routes(micro_batch).passes[segment]
        live.passes_left = len(passes)
        if any(one.sends is not None for one in passes):
            for tensor in floating(live.inputs):
                tensor.requires_grad_()
        dropout = self._seeded("dropout", segment, micro_batch)
        with dropout, torch.set_grad_enabled(bool(passes)):
            live.outputs = self.segments.run_segment(segment, live.inputs)
        if self.keep_output is not None:
            self.keep_output(segment, live.outputs)

    def send_activation(self, segment: int, micro_batch: int) -> None:
        live = self.live[segment, micro_batch]
        tag = Tag(self.step, micro_batch, self.last_step)
        message = activation_message(
            live.outputs, live.labels, self.figures, self.section.link, segment
        )
        self.activation_links[segment].send(tag, message)
        self._release(segment, micro_batch)  # if no loss of this micro-batch trains the segment

    def forward_only(self, data: Iterator[Any], segment: int, micro_batch: int) -> tuple[Any, Any]:
        """(outputs, labels) of a micro-batch that trains nothing; it is sent onward first."""
        self._data = data
        if segment:
            self.recv_activation(segment, micro_batch)
        else:
            self.load_micro_batch(segment, micro_batch)
        live = self.live[segment, micro_batch]
        live.outputs = self.segments.run_segment(segment, live.inputs)
        if segment + 1 < self.segments.num_segments:
            self.send_activation(segment, micro_batch)
        self.live.pop((segment, micro_batch), None)  # sending may have let go of it
        return live.outputs, live.labels

    # --- backward -------------------------------------------------------------------------------

    def recv_grad(self, segment: int, micro_batch: int, loss: int) -> None:
        link = self.gradient_links[Link("gradient", segment, loss - segment)]
        _, message = link.receive(Tag(self.step, micro_batch))
        self.live[segment, micro_batch].gradients[loss] = list(message.values())

    def send_grad(self, segment: int, micro_batch: int, loss: int) -> None:
        live = self.live[segment, micro_batch]
        link = self.gradient_links[Link("gradient", segment - 1, loss - (segment - 1))]
        link.send(Tag(self.step, micro_batch), pack("gradient", tuple(live.passed_on)))
        live.passed_on = []
        self._release(segment, micro_batch)

    def gradient_pass(self, segment: int, micro_batch: int, which: int, split: bool) -> None:
        live = self.live[segment, micro_batch]
        one = self._routes(micro_batch).passes[segment][which]
        if any(loss == segment for loss, _ in one.reads) and segment not in live.gradients:
            self._run_head(segment, micro_batch, live)
        outputs = [tensor for tensor in floating(live.outputs) if tensor.requires_grad]
        gradients = combine([(live.gradients[loss], factor) for loss, factor in one.reads])
        live.passes_left -= 1
        keep_graph = live.passes_left > 0
        inputs = [tensor for tensor in floating(live.inputs) if tensor.requires_grad]
        passed_on: list[Any] = []
        if not one.weights:
            with left_out():
                passed_on = list(
                    torch.autograd.grad(outputs, inputs, gradients, retain_graph=keep_graph)
                )
        elif outputs:
            with put_off() if split else nullcontext() as later:
                torch.autograd.backward(outputs, gradients, retain_graph=keep_graph)
            if later is not None:
                self._deferred[segment, micro_batch, which] = later
            passed_on = [tensor.grad for tensor in inputs]
            for tensor in inputs:
                tensor.grad = None
        if one.sends is None:
            self._release(segment, micro_batch)
        else:
            scale = one.send_scale
            live.passed_on = [g if scale == 1.0 else g * scale for g in passed_on]

    def weight_gradient(self, segment: int, micro_batch: int, which: int) -> None:
        catch_up(self._deferred.pop((segment, micro_batch, which)))

    def _run_head(self, segment: int, micro_batch: int, live: _Live) -> None:
        """Loss, gradients of the head's own parameters, and the loss's gradient at the output.

        The head works on a detached copy of the output, so it learns only from its own loss, and
        its logits are gone before the segment's own backward pass starts.
        """
        hidden = map_tensors(
            live.outputs, lambda t: t.detach().requires_grad_(t.is_floating_point())
        )
        with self._seeded("head", segment, micro_batch):
            loss = self.segments.loss_of(segment, hidden, live.labels)
        routes = self._routes(micro_batch)
        scale = routes.loss_weights[segment] / self._schedule.num_micro_batches
        torch.autograd.backward(loss * scale)
        live.gradients[segment] = [
            tensor.grad for tensor in floating(hidden) if tensor.grad is not None
        ]
        share = loss.detach() / self._num_losses[segment]
        self.losses[segment] = self.losses.get(segment, 0.0) + share

    # --- helpers --------------------------------------------------------------------------------

    def _release(self, segment: int, micro_batch: int) -> None:
        if not self.live[segment, micro_batch].passes_left:
            del self.live[segment, micro_batch]

    def _seeded(self, purpose: str, segment: int, micro_batch: int) -> AbstractContextManager[None]:
        seed = self.section.seed
        return seeded(seed, purpose, self.step, micro_batch, self.replica_id, segment)

    def _routes(self, micro_batch: int) -> Any:
        return self._schedule.rows[micro_batch]
