"""`Stash`: earlier weights of a stage, for micro-batches that go forward before an update and
backward after it.

Such a micro-batch goes forward on a copy, and backward on the same copy, which stands in for the
weights meanwhile: parameters keep their names, hooks and gradients, and get other memory. A copy
has the precision that the weights are used in; there is one for each update that micro-batches
under way have not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.errors import CheckpointError
from ds_local.schedules.run_ahead import weights_of
from ds_local.schedules.schedule import Schedule


class Stash:
    """How far the forwards of a stage are, and the weights they used.

    Weights are known by the optimizer steps done before them.

    Args:
        weights: of each local segment, without its head.
    """

    def __init__(self, weights: Mapping[int, Sequence[nn.Parameter]]) -> None:
        self._weights = weights
        self._copies: dict[tuple[int, int], list[Tensor]] = {}  # (segment, steps before)
        self._done: dict[int, int] = {}  # of each segment the forwards since the start
        self._step = 0
        self._schedule: Schedule | None = None
        self.start: int | None = None  # first step of the stretch; None: there is none
        self.under_way = False  # have forwards run ahead of the next step, in this process?

    def begin(self, step: int, schedule: Schedule) -> None:
        """Get ready for a step of a schedule whose forwards run ahead."""
        self._step, self._schedule, self.under_way = step, schedule, True
        if self.start is None:
            self.start = step

    def end(self) -> None:
        """The stretch is over, or given up: no copy is needed any more."""
        self.start, self._schedule, self.under_way = None, None, False
        self._copies.clear()
        self._done.clear()

    def forward(self, segment: int, step: int, micro_batch: int) -> int | None:
        """What weights the next forward uses, None for those that are there.

        Args:
            step: that the micro-batch belongs to.
        """
        if self._schedule is None or self.start is None:
            return None
        count = self._schedule.num_micro_batches
        position = (step - self.start) * count + micro_batch
        self._done[segment] = position + 1
        used = self._used(segment, position)
        if used == step:  # it goes backward before the next update
            return None
        if used == self._step:
            self._keep(segment)
        return used

    def _used(self, segment: int, position: int) -> int:
        schedule, start = self._schedule, self.start
        if schedule is None or start is None:
            raise RuntimeError("no stretch of steps has begun")
        return start + weights_of(schedule.leads[segment], position, schedule.num_micro_batches)

    def _keep(self, segment: int) -> None:
        key = segment, self._step
        if key not in self._copies:
            self._copies[key] = [p.detach().clone() for p in self._weights[segment]]

    @contextmanager
    def weights(self, segment: int, used: int | None) -> Iterator[None]:
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

    def let_go(self, segment: int, needed: Iterable[int | None]) -> None:
        """Drop the copies of a segment but those that micro-batches under way need, and those of
        forwards to come."""
        if self._schedule is None:
            return
        to_come = self._used(segment, self._done.get(segment, 0))
        kept = {to_come, *needed}
        for key in [one for one in self._copies if one[0] == segment and one[1] not in kept]:
            del self._copies[key]

    def before_update(self, last: int | None) -> None:
        """Keep the weights that go now, where forwards to come still need them: those of a segment
        that waits for the one below it on the same stage.

        Args:
            last: step of the stretch; None: not known.
        """
        if self._schedule is None or self.start is None:
            return
        for segment, done in self._done.items():
            of_step = self.start + done // self._schedule.num_micro_batches
            to_come = last is None or of_step <= last
            if to_come and self._used(segment, done) == self._step < of_step:
                self._keep(segment)

    def during_update(self) -> AbstractContextManager[object]:
        """Around an update. Autograd counts changes of a parameter, and would refuse to go backward
        although what it needs is in a copy."""
        if not self._copies:
            return nullcontext()
        parameters = tuple(p for one in self._weights.values() for p in one)
        return torch.autograd._unsafe_preserve_version_counter(parameters)

    def on_the_way(self, segment: int, last: int | None) -> Iterator[tuple[int, int]]:
        """(step, micro-batch) of what the segment below has sent and this one has not taken, between
        two steps.

        Args:
            last: see `before_update`.
        """
        schedule, start = self._schedule, self.start
        if schedule is None or start is None or not segment:
            return
        count = schedule.num_micro_batches
        begun = (self._step + 1 - start) * count
        sent, taken = (begun + schedule.forwards_ahead[s] for s in (segment - 1, segment))
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
            copies = {used: list(copy) for (s, used), copy in self._copies.items() if s == segment}
            state = {"start": self.start, "weights": copies, **_facts(self._schedule)}
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
                shapes = [[tensor.shape for tensor in one] for one in state["weights"].values()]
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

    def load(self, folder: str | Path | None, schedule: Schedule) -> None:
        """Go on with what ran ahead in a checkpoint, if it goes with this run; the micro-batches are
        computed once more, on the weights they had."""
        self.end()
        for segment, parameters in self._weights.items():
            path = Path(folder or "", stash_file(segment))
            if folder is None or not path.is_file():
                return
            state = torch.load(path, map_location=parameters[0].device, weights_only=True)
            if {key: state[key] for key in _facts(schedule)} != _facts(schedule):
                return
            self.start = state["start"]
            self._copies |= {(segment, used): copy for used, copy in state["weights"].items()}


def stash_file(segment: int) -> str:
    """Name of the checkpoint file with the earlier weights that a segment's micro-batches need."""
    return f"ahead_{segment:02d}-model_states.pt"


def _facts(schedule: Schedule) -> dict[str, Any]:
    """What must be the same for micro-batches to have the same weights."""
    return {"leads": list(schedule.leads), "micro_batches": schedule.num_micro_batches}
