"""`Stash`: earlier weights of a stage, for micro-batches that go forward before an update and
backward after it.

Such a micro-batch goes forward on a copy, and backward on the same copy, which stands in for the
weights meanwhile: parameters keep their names, hooks and gradients, and get other memory. A copy
has the precision that the weights are used in; there is one for each update that micro-batches
under way have not seen.

With prediction it stands further along: the last update is added once more for each update to come
before the one that the gradient goes into (linear weight prediction, as in SpecTrain, Chen et al.
2018, and XPipe, Guan et al. 2019, but from the update itself instead of a momentum).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_local.errors import CheckpointError
from ds_local.links.device import to_device
from ds_local.schedules.run_ahead import weights_of
from ds_local.schedules.schedule import Schedule


class Used(NamedTuple):
    """Which weights a micro-batch was computed with."""

    seen: int  # optimizer steps before them
    predicted: int  # and beyond


class Stash:
    """How far the forwards of a stage are, and the weights they used.

    Weights are known by the optimizer steps done before them, and the steps predicted beyond.

    Args:
        weights: of each local segment, without its head.
    """

    def __init__(self, weights: Mapping[int, Sequence[nn.Parameter]]) -> None:
        self._weights = weights
        self._copies: dict[tuple[int, Used], list[Tensor]] = {}  # (segment, which weights)
        self._before: dict[int, list[Tensor]] = {}  # of each segment, before the last update
        self._predicts = False
        self._done: dict[int, int] = {}  # of each segment the forwards since the start
        self._step = 0
        self._schedule: Schedule | None = None
        self.start: int | None = None  # first step of the stretch; None: there is none
        self.under_way = False  # have forwards run ahead of the next step, in this process?
        self._loaded = False  # has no step begun since?
        self._again: dict[int, int] = {}  # of each segment the forwards before a checkpoint

    def begin(self, step: int, schedule: Schedule, predicts: bool) -> None:
        """Get ready for a step of a schedule whose forwards run ahead.

        Args:
            predicts: copies stand where the weights are expected to be.
        """
        self._predicts = predicts
        self._step, self._schedule, self.under_way = step, schedule, True
        if self.start is None:
            self.start = step
        if self._loaded:
            begun = (step - self.start) * schedule.num_micro_batches
            self._again = {s: begun + schedule.leads[s] for s in self._weights}
            self._loaded = False

    def end(self) -> None:
        """The stretch is over, or given up: no copy is needed any more."""
        self.start, self._schedule, self.under_way = None, None, False
        self._loaded = False
        for forgotten in (self._copies, self._done, self._before, self._again):
            forgotten.clear()

    def forward(self, segment: int, step: int, micro_batch: int) -> Used | None:
        """What weights the next forward uses, None for those that are there.

        Args:
            step: that the micro-batch belongs to.
        """
        if self._schedule is None or self.start is None:
            return None
        count = self._schedule.num_micro_batches
        position = (step - self.start) * count + micro_batch
        self._done[segment] = position + 1
        seen = self._seen(segment, position)
        if seen == step:  # it goes backward before the next update
            return None
        used = Used(seen, step - seen if self._predicts else 0)
        if seen == self._step:
            self._keep(segment, used)
        return used

    def is_again(self, segment: int) -> bool:
        """Was the forward that `forward` was asked about last computed before a checkpoint too?"""
        return self._done.get(segment, 0) <= self._again.get(segment, 0) > 0

    def _seen(self, segment: int, position: int) -> int:
        schedule, start = self._schedule, self.start
        if schedule is None or start is None:
            raise RuntimeError("no stretch of steps has begun")
        return start + weights_of(schedule.leads[segment], position, schedule.num_micro_batches)

    def _keep(self, segment: int, used: Used) -> None:
        if (segment, used) in self._copies:
            return
        present = [parameter.detach() for parameter in self._weights[segment]]
        before = self._before.get(segment)
        if not used.predicted or before is None:
            self._copies[segment, used] = [tensor.clone() for tensor in present]
            return
        self._copies[segment, used] = [
            torch.lerp(old.float(), now.float(), 1.0 + used.predicted).to(now.dtype)
            for old, now in zip(before, present, strict=True)
        ]

    @contextmanager
    def weights(self, segment: int, used: Used | None) -> Iterator[None]:
        """Within, a segment has the weights that `forward` named."""
        if used is None:
            yield
            return
        parameters = self._weights[segment]
        present = [parameter.data for parameter in parameters]
        for parameter, copy in zip(parameters, self._copies[segment, used], strict=True):
            parameter.data = copy
        try:
            yield
        finally:
            for parameter, data in zip(parameters, present, strict=True):
                parameter.data = data

    def let_go(self, segment: int, needed: Iterable[Used | None]) -> None:
        """Drop the copies of a segment but those that micro-batches under way need, and those of
        forwards to come."""
        if self._schedule is None:
            return
        to_come, kept = self._seen(segment, self._done.get(segment, 0)), set(needed)
        for at, used in list(self._copies):
            if at == segment and used.seen < to_come and used not in kept:
                del self._copies[at, used]

    def before_update(self) -> None:
        """Where weights are predicted, keep those that go now: the next update is their distance
        to what comes."""
        if self._schedule is None or not self._predicts:
            return
        for segment in self._done:
            if self._schedule.leads[segment]:
                self._before[segment] = [p.detach().clone() for p in self._weights[segment]]

    def during_update(self) -> AbstractContextManager[object]:
        """Around an update. Autograd counts changes of a parameter, and would refuse to go backward
        although what it needs is in a copy."""
        if not self._copies:
            return nullcontext()
        parameters = tuple(p for one in self._weights.values() for p in one)
        return torch.autograd._unsafe_preserve_version_counter(parameters)

    def on_the_way(self, segment: int, last: int | None) -> Iterator[tuple[int, int]]:
        """(step, micro-batch) of what the segment below has sent and this one has not taken,
        between two steps.

        Args:
            last: step of the stretch; None: not known.
        """
        schedule, start = self._schedule, self.start
        if schedule is None or start is None or not segment:
            return
        count = schedule.num_micro_batches
        begun = (self._step + 1 - start) * count
        sent, taken = (begun + schedule.leads[s] for s in (segment - 1, segment))
        if last is not None:
            sent = min(sent, (last + 1 - start) * count)
        for position in range(taken, sent):
            step, micro_batch = divmod(position, count)
            yield start + step, micro_batch

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, write: Callable[[Any, str], None], folder: str | Path) -> None:
        """Keep what micro-batches under way need to be computed once more, in a file for each
        segment."""
        if self._schedule is None:
            return
        for segment in self._weights:
            copies = {tuple(used): copy for (s, used), copy in self._copies.items() if s == segment}
            state = {"start": self.start, "weights": copies, **_facts(self._schedule)}
            if segment in self._before:
                state["before"] = self._before[segment]
            write(state, str(Path(folder, stash_file(segment))))

    def check(self, look: Callable[[str], Any], files: Container[str], schedule: Schedule) -> bool:
        """Do the files that `load` would read go with this run?

        Args:
            look: gives the content of a file of the checkpoint.
            files: names of all files in it.
            schedule: of the next step.

        Raises:
            CheckpointError: when one is not what `save` writes.
        """
        fits = True
        for segment, parameters in self._weights.items():
            name = stash_file(segment)
            if name not in files:
                fits = fits and not schedule.leads
                continue
            state = look(name)
            try:
                same = {key: state[key] for key in _facts(schedule)} == _facts(schedule)
                kept = [
                    *state["weights"].values(),
                    *([state["before"]] if "before" in state else []),
                ]
                shapes = [[tensor.shape for tensor in one] for one in kept]
                known = isinstance(state["start"], int)
            except (KeyError, TypeError, AttributeError):
                same = known = False
                shapes = []
            wanted = [parameter.shape for parameter in parameters]
            if not known or any(found != wanted for found in shapes):
                raise CheckpointError(
                    f"{name} is not what segment {segment} keeps for what runs ahead; use another "
                    "checkpoint"
                )
            fits = fits and same
        return fits

    def load(self, look: Callable[[str], Any], files: Container[str], schedule: Schedule) -> None:
        """Go on with what ran ahead in a checkpoint, if it goes with this run; the micro-batches
        are computed once more, on the weights they had. Arguments as for `check`."""
        self.end()
        for segment, parameters in self._weights.items():
            if stash_file(segment) not in files:
                return
            state = look(stash_file(segment))
            if {key: state[key] for key in _facts(schedule)} != _facts(schedule):
                return
            self.start = state["start"]
            for used, copy in state["weights"].items():
                self._copies[segment, Used(*used)] = _beside(parameters, copy)
            if "before" in state:
                self._before[segment] = _beside(parameters, state["before"])
        self._loaded = self.start is not None


def stash_file(segment: int) -> str:
    """Name of the checkpoint file with the earlier weights that a segment's micro-batches need."""
    return f"ahead_{segment:02d}-model_states.pt"


def _beside(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a checkpoint, each on the device of its parameter."""
    pairs = zip(parameters, tensors, strict=True)
    return [to_device(tensor.clone(), parameter.device) for parameter, tensor in pairs]


def _facts(schedule: Schedule) -> dict[str, Any]:
    """What must be the same for micro-batches to have the same weights."""
    return {"leads": list(schedule.leads), "micro_batches": schedule.num_micro_batches}
