"""`Executor`: runs a stage's instructions. Knows segments, links and autograd, and no DeepSpeed.

Gradients are accumulated by plain autograd passes, with losses scaled here. Everything is kept by
(segment, micro-batch), so segments of one stage and micro-batches under way never mix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_local.config.schema import LocalParallelConfig
from ds_local.engine import finite
from ds_local.engine.layer_runs import BuffersAsTheyAre
from ds_local.engine.stash import Stash, Used
from ds_local.errors import ConfigError, OutOfData
from ds_local.links.buffers import Tag
from ds_local.links.messages import (
    Slots,
    activation_message,
    combine,
    copied_to,
    gradient_message,
    parts_of_activation,
    parts_of_gradient,
)
from ds_local.links.pair import Receiver
from ds_local.links.transport import End, MemoryLink
from ds_local.links.trees import CannotTravel, Tree
from ds_local.model.seeds import seeded
from ds_local.model.split_linear import (
    DeferredGrads,
    defer_weight_grads,
    no_weight_grads,
    run_deferred,
)
from ds_local.schedules.routes import Routes
from ds_local.schedules.schedule import Link, Schedule


class Segments(Protocol):
    """What the executor asks of a model."""

    num_segments: int
    local_segments: Sequence[int]
    # of the segment that ran last
    router_loss: Tensor | None
    shallow: Tensor | None

    def router_factor(self, routes: Routes, segment: int, which: int) -> float: ...

    def split_batch(self, batch: Any) -> tuple[Any, Any]: ...

    def weight_of(self, labels: Any) -> float | Tensor: ...

    def layers_of(self, segment: int) -> list[Callable[[Any], Any]]: ...

    def run_segment(self, segment: int, inputs: Any) -> Any: ...

    def loss_of(self, segment: int, hidden: Any, labels: Any, shallow: Any = None) -> Tensor: ...

    def name_of_output(self, segment: int) -> str: ...


_NOTHING = Tree([], None)


@dataclass
class _Live:
    """What a segment keeps of a micro-batch between its forward and its last pass."""

    inputs: Tree  # until the forward
    labels: Tree
    weight: float = 1.0  # among the micro-batches of its step, 1 on average
    learns: Sequence[bool] = ()  # by slot of the inputs: is a gradient wanted where they come from?
    slots: list[Tensor] = field(default_factory=list)  # of the inputs, if gradients go down
    outputs: Tree = _NOTHING
    gradients: dict[int, Slots] = field(default_factory=dict)  # loss -> at the outputs
    passed_on: Slots = field(default_factory=list)  # gradient at the inputs, to be sent
    passes_left: int = 0
    used: Used | None = None  # weights that are not there any more, see `stash.Stash`
    router_loss: Tensor | None = None  # of the segment's experts
    shallow: Tensor | None = None  # what the segment took in, if its head's companion foresees it


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
        stash: earlier weights of this stage.
        mean_over_replicas: the mean of a number over the replicas that average gradients.
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
        stash: Stash,
        mean_over_replicas: Callable[[float], float] = float,
    ) -> None:
        self.segments, self.section = segments, section
        self.device, self.replica_id = device, replica_id
        self.activation_links: Mapping[int, Any] = activation_links
        self.gradient_links: Mapping[Link, Any] = gradient_links
        self.figures = figures
        self.mean_over_replicas = mean_over_replicas
        self.stash = stash
        self.step = 0
        self.run_ends = False  # the run ends after the newest step
        # steps after which it does, the data or the phase ends, if known; the first two ride along
        # with activations
        self.stop_after: int | None = None
        self.data_end: int | None = None
        self.phase_end: int | None = None
        self.losses: dict[int, Tensor] = {}  # of this step, by segment
        self.counted: dict[int, tuple[float, int]] = {}  # (weight, micro-batches) of these losses
        self.router_losses: dict[int, tuple[Tensor, int]] = {}  # mean over so many micro-batches
        self.watch = finite.Watch()  # of this step
        self._watches: dict[int, finite.Watch] = {}  # of later ones
        self.live: dict[tuple[int, int, int], _Live] = {}  # (segment, step, micro-batch)
        self.keep_output: Callable[[int, Any], None] | None = None
        self._deferred: dict[
            tuple[int, int, int], DeferredGrads
        ] = {}  # (segment, micro-batch, pass)
        self._schedule: Schedule
        self._data: Iterator[Any] = iter(())
        self._read: deque[tuple[Any, Any, float]] = deque()  # inputs, labels, weight
        self._next_step: deque[tuple[Any, Any]] = deque()  # read to see whether there is one
        self.on_figures: Callable[[], None] = lambda: None  # called when new ones have come

    def begin(self, step: int, schedule: Schedule, data: Iterator[Any]) -> None:
        """Get ready for a step.

        Args:
            data: micro-batches; read where the first segment is.
        """
        self.step, self._schedule, self._data = step, schedule, data
        self.losses, self.counted, self.router_losses = {}, {}, {}
        if schedule.leads:
            self.stash.begin(step, schedule, self.section.scheme_at(step).predict_weights)
        else:
            self._read.clear()
        self.watch = self._watches.pop(step, finite.Watch())

    @property
    def last_of_stretch(self) -> int | None:
        """The last step that forwards may belong to, as far as is known."""
        return min(
            (end for end in (self.data_end, self.phase_end) if end is not None), default=None
        )

    def is_too_late(self, ahead: int) -> bool:
        """Does a micro-batch so many steps ahead belong to a step that will not be, or begins
        afresh?"""
        last = self.last_of_stretch
        return ahead > 0 and last is not None and self.step + ahead > last

    def finish(self) -> None:
        """The step is done."""
        last = self.last_of_stretch
        if self.stash.start is not None and last is not None and self.step >= last:
            self.stash.end()
        self.run_ends |= self.stop_after is not None and self.step >= self.stop_after

    def abandon(self) -> None:
        """Forget what has run ahead, and take what is still on its way. All stages must do it after
        the same step."""
        for segment in range(1, self.segments.num_segments):
            link = self.activation_links[segment - 1]
            if isinstance(link, MemoryLink | Receiver):
                for tag in self.stash.on_the_way(segment, self.last_of_stretch):
                    link.receive(Tag(*tag))
        self.stash.end()
        self.stop_after = self.data_end = None
        for forgotten in (self.live, self._watches, self._read, self._next_step):
            forgotten.clear()

    def leave_out(self) -> None:
        """Forget what there is of this step: the rest of it will not come."""
        self.losses, self.counted, self.router_losses = {}, {}, {}
        self.watch = finite.Watch()
        for forgotten in (self.live, self._deferred, self._read):
            forgotten.clear()

    # --- forward --------------------------------------------------------------------------------

    def load_micro_batch(self, segment: int, micro_batch: int, ahead: int = 0) -> None:
        if not self._read:
            self._read_on(micro_batch, self.step + ahead)
        self._load(segment, micro_batch, ahead, *self._read.popleft())

    def _load(
        self, segment: int, micro_batch: int, ahead: int, inputs: Any, labels: Any, weight: float
    ) -> None:
        try:
            live = _Live(copied_to(inputs, self.device), copied_to(labels, self.device), weight)
        except CannotTravel as error:
            raise ConfigError(f"the data holds {error}") from None
        self.live[segment, self.step + ahead, micro_batch] = live
        self._see_inputs(segment, micro_batch, ahead)

    def _read_on(self, micro_batch: int, step: int) -> None:
        """Read the next micro-batch, or all of the step's where they are weighed or forwards run
        ahead."""
        if not self._weighs_tokens and not self._schedule.leads:
            self._read.append((*self._next(micro_batch), 1.0))
            return
        count = self._schedule.num_micro_batches
        pairs = [self._next(number) for number in range(count)]
        if self._schedule.leads:
            self._look_ahead(step)
        weights = [1.0] * count
        if self._weighs_tokens:
            targets = [float(self.segments.weight_of(labels)) for _, labels in pairs]
            mean = self.mean_over_replicas(sum(targets) / count)
            weights = [number / mean if mean else 0.0 for number in targets]
        self._read.extend((*pair, weight) for pair, weight in zip(pairs, weights, strict=True))

    def _look_ahead(self, step: int) -> None:
        """Before the last messages of a step go out: is there data for another one?"""
        last = self.last_of_stretch
        if last is not None and step >= last:
            return
        try:
            pairs = [self._next(number) for number in range(self._schedule.num_micro_batches)]
        except OutOfData:
            self.data_end = step
        else:
            self._next_step.extend(pairs)

    def _next(self, micro_batch: int) -> tuple[Any, Any]:
        return self._next_step.popleft() if self._next_step else self._take(self._data, micro_batch)

    def _take(self, data: Iterator[Any], micro_batch: int) -> tuple[Any, Any]:
        try:
            batch = next(data)
        except StopIteration:
            number = max(micro_batch, -1 - micro_batch)  # those of an evaluation are negative
            raise OutOfData(
                f"the data ran out at micro-batch {number}; wrap the loader in "
                "deepspeed.utils.RepeatingLoader, or stop earlier"
            ) from None
        return self.segments.split_batch(batch)

    def recv_activation(self, segment: int, micro_batch: int, ahead: int = 0) -> None:
        link = self.activation_links[segment - 1]
        tag, message = link.receive(Tag(self.step + ahead, micro_batch))
        if tag.run_ends and micro_batch < 0:
            self.run_ends = True
        elif tag.run_ends:
            self.stop_after = tag.step
        if tag.data_ends:
            self.data_end = tag.step
        arrived = parts_of_activation(message)
        if not isinstance(link, MemoryLink):  # else they are older than those that are there
            below = [s for s in range(segment) if s not in self.segments.local_segments]
            self.figures[below] = arrived.figures[below]
            self.on_figures()
        live = _Live(arrived.hidden, arrived.labels, arrived.weight, arrived.learns)
        self.live[segment, tag.step, micro_batch] = live
        self._see_inputs(segment, micro_batch, ahead)

    def _see_inputs(self, segment: int, micro_batch: int, ahead: int) -> None:
        live = self.live[segment, self.step + ahead, micro_batch]
        learning = [s for s, wanted in zip(live.inputs.slots, live.learns, strict=False) if wanted]
        seen = finite.state_in(live.inputs.slots, learning)
        self._watch_of(ahead).see(finite.BELOW, segment, seen, micro_batch)

    def _watch_of(self, ahead: int) -> finite.Watch:
        if not ahead:
            return self.watch
        return self._watches.setdefault(self.step + ahead, finite.Watch())

    def forward_pass(self, segment: int, micro_batch: int, ahead: int = 0) -> None:
        step = self.step + ahead
        live = self.live[segment, step, micro_batch]
        live.used = self.stash.forward(segment, step, micro_batch)
        passes = self._routes(micro_batch).passes[segment]
        live.passes_left = len(passes)
        inputs, live.inputs = live.inputs, _NOTHING
        if any(one.sends is not None for one in passes):
            live.slots = inputs.slots
            for slot, wanted in zip(live.slots, live.learns, strict=True):
                slot.requires_grad_(wanted)
            inputs = inputs.map(_writable)
        dropout = self._seeded("dropout", segment, micro_batch, step)
        weights = self.stash.weights(segment, live.used)
        again = self.stash.is_again(segment)
        buffers = BuffersAsTheyAre(self.segments.layers_of(segment)) if again else nullcontext()
        with dropout, weights, buffers, torch.set_grad_enabled(bool(passes)):
            self._run(segment, live, inputs)
        if segment in self._routes(micro_batch).weights:
            live.shallow = self.segments.shallow
        slots = live.outputs.slots
        seen = finite.state_in(slots, [slot for slot in slots if slot.requires_grad])
        self._watch_of(ahead).see(finite.OUTPUT, segment, seen, micro_batch)
        if self.keep_output is not None:
            self.keep_output(segment, live.outputs.value())

    def _run(self, segment: int, live: _Live, inputs: Tree) -> None:
        outputs = self.segments.run_segment(segment, inputs.value())
        live.router_loss = self.segments.router_loss
        try:
            live.outputs = Tree.of(outputs)
        except CannotTravel as error:
            raise self._refused(segment, error) from None

    def send_activation(self, segment: int, micro_batch: int, ahead: int = 0) -> None:
        step = self.step + ahead
        live = self.live[segment, step, micro_batch]
        stops = self.run_ends if micro_batch < 0 else step == self.stop_after
        tag = Tag(step, micro_batch, stops, step == self.data_end)
        message = self.message(segment, live.outputs, live.labels, live.weight)
        self.activation_links[segment].send(tag, message)
        self._release(
            segment, micro_batch, ahead
        )  # if no loss of this micro-batch trains the segment

    def message(
        self, segment: int, outputs: Tree, labels: Tree, weight: float = 1.0
    ) -> dict[str, Tensor]:
        """What goes from a segment to the next. Raises ConfigError when something cannot travel."""
        try:
            return activation_message(
                outputs,
                labels,
                self.figures,
                self.section.link,
                segment,
                weight if self._weighs_tokens else None,
            )
        except CannotTravel as error:
            raise self._refused(segment, error) from None

    def forward_only(self, data: Iterator[Any], segment: int, micro_batch: int) -> tuple[Any, Any]:
        """(outputs, labels) of a micro-batch that trains nothing; it is sent onward first. Both are
        the caller's, who may change them."""
        if segment:
            self.recv_activation(segment, micro_batch)
        else:
            self._load(segment, micro_batch, 0, *self._take(data, micro_batch), 1.0)
        live = self.live[segment, self.step, micro_batch]
        self._run(segment, live, live.inputs)
        if segment + 1 < self.segments.num_segments:
            self.send_activation(segment, micro_batch)
        self.live.pop((segment, self.step, micro_batch), None)  # sending may have let go of it
        outputs, labels = (self._for_head(segment, t) for t in (live.outputs, live.labels))
        return outputs.value(), labels.value()

    def serve(self, segment: int, micro_batch: int) -> None:
        """A forward as in training, for the segments above alone."""
        if segment:
            self.recv_activation(segment, micro_batch)
        else:
            self.load_micro_batch(segment, micro_batch)
        live = self.live[segment, self.step, micro_batch]
        with self._seeded("dropout", segment, micro_batch, self.step):
            self._run(segment, live, live.inputs)
        if segment + 1 < self.segments.num_segments:
            self.send_activation(segment, micro_batch)
        self.live.pop((segment, self.step, micro_batch), None)  # sending may have let go of it

    # --- backward -------------------------------------------------------------------------------

    def recv_grad(self, segment: int, micro_batch: int, loss: int) -> None:
        link = self.gradient_links[Link("gradient", segment, loss - segment)]
        _, message = link.receive(Tag(self.step, micro_batch))
        live = self.live[segment, self.step, micro_batch]
        gradients = live.gradients[loss] = parts_of_gradient(message)
        self.watch.see(finite.ABOVE, segment, gradients, micro_batch)

    def send_grad(self, segment: int, micro_batch: int, loss: int) -> None:
        live = self.live[segment, self.step, micro_batch]
        link = self.gradient_links[Link("gradient", segment - 1, loss - (segment - 1))]
        link.send(Tag(self.step, micro_batch), gradient_message(live.passed_on, live.slots))
        live.passed_on = []
        self._release(segment, micro_batch)

    def gradient_pass(self, segment: int, micro_batch: int, which: int, split: bool) -> None:
        live = self.live[segment, self.step, micro_batch]
        one = self._routes(micro_batch).passes[segment][which]
        if any(loss == segment for loss, _ in one.reads) and segment not in live.gradients:
            self._run_head(segment, micro_batch, live)
        gradients = combine([(live.gradients[loss], factor) for loss, factor in one.reads])
        pairs = zip(live.outputs.slots, gradients, strict=True)
        read = [(slot, g) for slot, g in pairs if g is not None and slot.requires_grad]
        outputs, given = [slot for slot, _ in read], [g for _, g in read]
        inputs = [slot for slot in live.slots if slot.requires_grad]
        live.passes_left -= 1
        keep_graph = live.passes_left > 0
        found: Sequence[Tensor | None] = [None] * len(inputs)
        routed = self._router_gradient(segment, micro_batch, which, live) if outputs else ([], [])
        roots, seeds = [[*a, *b] for a, b in zip((outputs, given), routed, strict=True)]
        if outputs and inputs and not one.weights:
            with no_weight_grads(), self.stash.weights(segment, live.used):
                found = torch.autograd.grad(
                    roots, inputs, seeds, retain_graph=keep_graph, allow_unused=True
                )
        elif outputs and one.weights:
            weights = self.stash.weights(segment, live.used)
            with defer_weight_grads() if split else nullcontext() as deferred, weights:
                torch.autograd.backward(roots, seeds, retain_graph=keep_graph)
            if deferred is not None:
                self._deferred[segment, micro_batch, which] = deferred
            found = [slot.grad for slot in inputs]
            for slot in inputs:
                slot.grad = None
        if one.sends is None:
            self._release(segment, micro_batch)
        else:
            by_slot = iter(found)
            found = [next(by_slot) if slot.requires_grad else None for slot in live.slots]
            live.passed_on = combine([(list(found), one.send_scale)])
            self.watch.see(finite.SENT, segment, live.passed_on, micro_batch)

    def _router_gradient(
        self, segment: int, micro_batch: int, which: int, live: _Live
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The segment's router loss, where it has one, and its share in what the pass learns, or
        hands down."""
        loss, routes = live.router_loss, self._routes(micro_batch)
        if loss is None or not loss.requires_grad:
            return [], []
        factor = self.segments.router_factor(routes, segment, which)
        if routes.passes[segment][which].weights:
            live.router_loss = None
            mean, count = self.router_losses.get(segment, (loss.detach(), 0))
            mean = torch.lerp(mean, loss.detach(), 1.0 / (count + 1))
            self.router_losses[segment] = mean, count + 1
        elif not factor:  # it belongs to no loss in this pass
            return [], []
        scale = factor * live.weight / self._schedule.num_micro_batches
        return [loss], [torch.full_like(loss, scale)]

    def weight_gradient(self, segment: int, micro_batch: int, which: int) -> None:
        run_deferred(self._deferred.pop((segment, micro_batch, which), []))

    def _run_head(self, segment: int, micro_batch: int, live: _Live) -> None:
        """Loss, gradients of the head's own parameters, and the loss's gradient at the output.

        The head works on a detached copy of the output, so it learns only from its own loss, and
        its logits are gone before the segment's own backward pass starts.
        """
        slots = [s.detach().requires_grad_(s.requires_grad) for s in live.outputs.slots]
        hidden = self._for_head(segment, live.outputs.with_slots(slots))
        labels = self._for_head(segment, live.labels).value()
        with self._seeded("head", segment, micro_batch, self.step):
            loss = self.segments.loss_of(segment, hidden.value(), labels, live.shallow)
        live.shallow = None
        if segment + 1 == self.segments.num_segments:
            _note_changes(hidden.slots, live.outputs.slots)
        scale = self._routes(micro_batch).loss_weights[segment] * live.weight
        if loss.requires_grad:
            torch.autograd.backward(loss * (scale / self._schedule.num_micro_batches))
        live.gradients[segment] = [slot.grad for slot in slots]
        self.watch.see(finite.LOSS, segment, [loss], micro_batch)
        self._book(segment, loss.detach(), live.weight)

    def _for_head(self, segment: int, tree: Tree) -> Tree:
        """A value that a head may change in place. What goes to the next segment is not touched,
        since a device may still be copying it; logits, which may be large, are not copied."""
        is_last = segment + 1 == self.segments.num_segments
        return tree.map(_writable if is_last else Tensor.clone)

    def _book(self, segment: int, loss: Tensor, weight: float) -> None:
        """Take a micro-batch's loss into the mean of the step."""
        total, count = self.counted.get(segment, (0.0, 0))
        self.counted[segment] = total + weight, count + 1
        share = weight / (total + weight or 1.0)
        self.losses[segment] = torch.lerp(self.losses[segment], loss, share) if count else loss

    # --- helpers --------------------------------------------------------------------------------

    def _release(self, segment: int, micro_batch: int, ahead: int = 0) -> None:
        key = segment, self.step + ahead, micro_batch
        if not self.live[key].passes_left and self.live.pop(key).used is not None:
            used = [live.used for (at, *_), live in self.live.items() if at == segment]
            self.stash.let_go(segment, used)

    def _seeded(
        self, purpose: str, segment: int, micro_batch: int, step: int
    ) -> AbstractContextManager[None]:
        seed = self.section.seed
        return seeded(seed, purpose, step, micro_batch, self.replica_id, segment)

    def _routes(self, micro_batch: int) -> Any:
        return self._schedule.rows[micro_batch]

    @property
    def _weighs_tokens(self) -> bool:
        return self.section.loss_weighting == "token"

    def _refused(self, segment: int, error: CannotTravel) -> ConfigError:
        return ConfigError(f"{self.segments.name_of_output(segment)} passes on {error}")


def _writable(tensor: Tensor) -> Tensor:
    """The same memory, as a tensor that may be changed in place although it requires gradient.

    It counts its changes by itself, see `_note_changes`.
    """
    return torch.ops.aten._unsafe_view(tensor, tensor.shape) if tensor.requires_grad else tensor


def _note_changes(writable: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Let autograd know what was changed in place, so that it refuses to compute with what is not
    any more what it kept."""
    for changed, tensor in zip(writable, tensors, strict=True):
        if changed.requires_grad and changed._version:
            torch.autograd.graph.increment_version(tensor)
