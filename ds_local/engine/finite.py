"""Numbers that are not finite: seen where they arise, at the cost of one host read a step.

While a step runs, the stage keeps a number of everything that could carry a NaN or an infinity: the
sum of a hidden state, a loss, the norm of a gradient. Such a number is finite only if all that went
into it is. They stay on the device until `Watch.judge` reads them all at once, before the optimizer
step. What came from a neighbour is looked at too, so a stage knows what it only passes on: the
stage where it arose is the one that got nothing but finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_local.errors import NonFiniteError
from ds_local.links.device import to_device
from ds_local.links.logs import LOG

# what a segment's step can suffer from, first causes first; all but the last two arose in it
KINDS = ("batch", "activation", "loss", "gradient", "from_below", "from_above")
_WORDS = {
    "batch": "the batch for segment {} was",
    "activation": "the activation of segment {} was",
    "loss": "the loss of segment {} was",
    "gradient": "the gradient of segment {} was",
    "from_below": "what segment {} got from below was",
    "from_above": "the gradient that segment {} got from above was",
}
_TOLD_ALL = 10  # events of a stage that are told one by one; later ones by the hundred

# what is looked at: of a micro-batch the hidden state that came and the one that went on, the loss,
# the gradient that came and the one that went on; of a step the norm of the weights' gradient
BELOW, OUTPUT, LOSS, ABOVE, SENT, WEIGHTS = range(6)
_OF_THE_STEP = -1  # in place of a micro-batch


def arose_here(kind: str) -> bool:
    return not kind.startswith("from_")


def state_in(slots: Sequence[Tensor], learning: Sequence[Tensor]) -> Sequence[Tensor]:
    """What to look at in a hidden state: all that gradients flow through; where nothing does, the
    largest entries, since a mask may well hold -inf."""
    return learning or [t.abs().amax() if t.is_complex() else t.amax() for t in slots if t.numel()]


class Watch:
    """What a stage has seen in the step that runs."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int, int]] = []  # (what, segment, micro-batch)
        self._numbers: list[Tensor | None] = []

    def see(
        self,
        what: int,
        segment: int,
        tensors: Iterable[Tensor | None],
        micro_batch: int = _OF_THE_STEP,
    ) -> None:
        """Keep the sum of each of `tensors`; nobody waits for it. None has a place too, since
        another replica may have something there."""
        for tensor in tensors:
            self._keys.append((what, segment, micro_batch))
            self._numbers.append(None if tensor is None else tensor.detach().sum())

    def flags(self, device: torch.device) -> Tensor:
        """For each number 1 if it is not finite, else 0; the same numbers on all replicas."""
        if not self._numbers:
            return torch.zeros(0, device=device)
        nothing = torch.zeros((), device=device)
        numbers = [
            nothing if number is None else to_device(number, device)  # a layer's own, perhaps
            for number in self._numbers
        ]
        return (~torch.isfinite(torch.stack(numbers))).float()

    def judge(self, flags: Sequence[float]) -> dict[int, str]:
        """The segments that must not be updated, and why.

        Args:
            flags: as `flags` gives them, perhaps added up over replicas.
        """
        bad = {key for key, flag in zip(self._keys, flags, strict=True) if flag}
        return {
            segment: kind
            for segment in sorted({segment for _, segment, _ in bad})
            if (kind := _kind({(what, at) for what, s, at in bad if s == segment}, segment))
        }


def _kind(bad: set[tuple[int, int]], segment: int) -> str | None:
    """What a segment suffers from; None where nothing that is not finite reaches its weights."""
    found = set()
    for micro_batch in {at for _, at in bad if at != _OF_THE_STEP}:
        seen = {what for what, at in bad if at == micro_batch}
        if BELOW in seen:
            found.add("from_below" if segment else "batch")
        elif OUTPUT in seen:
            found.add("activation")
        else:
            found |= {kind for what, kind in _BACKWARD if what in seen}
            if seen == {SENT}:
                found.add("gradient")
    if (WEIGHTS, _OF_THE_STEP) in bad:
        found = found or {"gradient"}
    elif not any(map(arose_here, found)):
        return None
    return min(found, key=KINDS.index)


_BACKWARD = ((LOSS, "loss"), (ABOVE, "from_above"))


class Events:
    """The steps that a stage has left out, for want of finite numbers.

    Args:
        limit: left out in a row, the stage where they arose ends the run. A stage that only got
            them from a neighbour ends it one step later: by then it has heard of the first.
        stage: of this rank.
        replica: of this rank, where replicas train apart.
        speaks: this rank tells what happens; else another replica of the stage does.
    """

    def __init__(self, limit: int, stage: int, replica: int | None, speaks: bool) -> None:
        self.say: Callable[[str], None] = LOG.warning
        self.tell: Callable[[dict[str, Any]], None] = lambda event: None  # what ends the run
        self.newest: dict[int, tuple[str, int]] = {}  # segment -> (kind, steps done)
        self._limit, self._stage, self._speaks = limit, stage, speaks
        self._who = f"stage {stage}" + ("" if replica is None else f", replica {replica}")
        self._in_a_row: dict[int, int] = {}
        self._skipped = 0

    def book(self, step: int, kinds: Mapping[int, str], skipped: int) -> None:
        """Note and tell what happened.

        Args:
            step: optimizer steps done, this one included.
            kinds: by segment, of those that were not updated.
            skipped: steps that the stage has left out so far.
        """
        self._skipped = skipped
        self._in_a_row = {segment: self._in_a_row.get(segment, 0) + 1 for segment in kinds}
        for segment, kind in kinds.items():
            self.newest[segment] = kind, step
            if self._speaks and (skipped <= _TOLD_ALL or skipped % 100 == 0):
                self.say(
                    f"step {step}, {self._who}: {_WORDS[kind].format(segment)} not finite; its "
                    f"update is left out, the {_ordinal(skipped)} on this stage"
                )

    def check(self) -> None:
        """Raises NonFiniteError when the last steps were too many in a row."""
        for segment, count in self._in_a_row.items():
            kind, step = self.newest[segment]
            if count < self._limit + (not arose_here(kind)):
                continue
            if self._speaks:
                facts = {"step": step, "segment": segment, "stage": self._stage}
                event = {"nonfinite": kind, "nonfinite_step": step, "skipped": self._skipped}
                self.tell(facts | event)
            in_a_row = f", the {_ordinal(count)} time in a row" if count > 1 else ""
            raise NonFiniteError(
                f"{_WORDS[kind].format(segment)} not finite in step {step} on "
                f"{self._who}{in_a_row}; go on from the latest checkpoint with a lower learning "
                "rate or other data, or let "
                'more such steps pass with local_parallel.on_nonfinite {"skip": n}'
            )


def _ordinal(count: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{'th' if count % 100 in (11, 12, 13) else ending}"
