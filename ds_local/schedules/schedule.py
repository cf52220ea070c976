"""The compute order of every stage as plain data, and all that follows from it.

A `Schedule` lists, stage by stage, the forwards and gradient passes of one optimizer step. It is
the only description of a schedule in this package: the engine executes it, `print` shows it as a
grid, `validate` proves that it cannot deadlock, the simulator gives it times. Transfers are not
listed, they are derived: an action that needs the result of another segment receives it, an action
whose result another segment needs sends it (`Schedule.requires`, `Schedule.sends`).

Pure Python: no torch, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from ds_local.schedules.routes import Pass, Routes

FORWARD = "F"  # the segment's layers
BACKWARD = "B"  # a pass with parameter gradients; sends an input gradient where the route says so
INPUT_GRADIENT = (
    "I"  # a pass that only hands a gradient through, or the first half of a backward that is split
)
WEIGHT_GRADIENT = "W"  # the other half of a backward that is split


class Action(NamedTuple):
    """One piece of compute of one segment on one micro-batch."""

    kind: str
    segment: int
    micro_batch: int
    which: int = 0  # of the segment's passes; 0 for a forward
    ahead: int = 0  # steps from the one it is computed in to the one its micro-batch belongs to

    @classmethod
    def of_pass(
        cls, one: Pass, segment: int, micro_batch: int, which: int, split: bool
    ) -> list[Action]:
        """What a pass is made of: one action, or two where it trains weights, sends a gradient and
        may be split."""
        if split and one.weights and one.sends is not None:
            kinds = [INPUT_GRADIENT, WEIGHT_GRADIENT]
        else:
            kinds = [BACKWARD if one.weights else INPUT_GRADIENT]
        return [cls(kind, segment, micro_batch, which) for kind in kinds]

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}{'+' * self.ahead}"


class Link(NamedTuple):
    """A one-way channel between two neighbouring segments."""

    kind: str  # "activation" (up) or "gradient" (down)
    lower: int  # the lower of the two segments
    # of a gradient: how far above the lower segment its loss is; each distance has its own link
    distance: int = 0

    def __str__(self) -> str:
        arrow = "->" if self.kind == "activation" else "<-"
        return f"{self.kind} link {self.lower} {arrow} {self.lower + 1}" + (
            f" (loss distance {self.distance})" if self.distance else ""
        )


class Wire(NamedTuple):
    """What an action needs and gives; others by their number in `Schedule.wiring`."""

    stage: int
    action: Action
    own: tuple[int, ...]  # needed from its own stage
    received: tuple[int, ...]  # needed from neighbouring stages
    taken: tuple[Link, ...]  # whose messages these are
    link: Link | None  # where its result leaves the stage
    # needed from other steps, with the link between stages it comes over
    elsewhere: tuple[tuple[Action, Link | None], ...] = ()


class Event(NamedTuple):
    """An executed action of a replay, in time units of its costs."""

    stage: int
    step: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """What every stage computes in one optimizer step, in order. Build it with
    `list_scheduler.make_schedule`, or `run_ahead.make_run_ahead` where forwards of later steps run
    ahead; then this is a step in the middle of a run, and `at` gives those at its ends."""

    name: str
    stages: tuple[tuple[Action, ...], ...]
    stage_of: tuple[int, ...]  # segment -> stage
    rows: tuple[Routes, ...]  # the table of each micro-batch
    leads: tuple[int, ...] = ()  # of each segment, see `run_ahead`; (): nothing runs ahead
    opening: tuple[tuple[Action, ...], ...] = ()  # of each stage, before the first of all steps
    is_first: bool = False  # nothing has run ahead before it
    steps_left: int | None = None  # with this one, if so few that it matters

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_micro_batches(self) -> int:
        return len(self.rows)

    def route(self, action: Action) -> Pass:
        """The pass an action other than a forward belongs to."""
        return self.rows[action.micro_batch].passes[action.segment][action.which]

    def requires(self, action: Action) -> list[tuple[Action, Link | None]]:
        """The actions that must have run before `action`, with the link their result comes over
        (None: same segment).

        A message that several passes of a segment read is received once, for the first of them.
        """
        kind, segment, micro_batch, which, ahead = action
        if kind == FORWARD:
            below = segment - 1
            return (
                [(Action(FORWARD, below, micro_batch, ahead=ahead), Link("activation", below))]
                if segment
                else []
            )
        if kind == WEIGHT_GRADIENT:
            return [(Action(INPUT_GRADIENT, segment, micro_batch, which), None)]
        required: list[tuple[Action, Link | None]] = [(Action(FORWARD, segment, micro_batch), None)]
        for loss in self.received(action):
            sender = self._senders[segment + 1, micro_batch, loss]
            required.append((sender, Link("gradient", segment, loss - segment)))
        return required

    def received(self, action: Action) -> list[int]:
        """The losses whose gradients `action`, a pass, receives from the segment above."""
        segment, micro_batch = action.segment, action.micro_batch
        losses = [loss for loss, _ in self.route(action).reads if loss != segment]
        return [loss for loss in losses if self._receivers[segment, micro_batch, loss] == action]

    def sends(self, action: Action) -> Link | None:
        """The link on which the result of `action` leaves its segment, if any."""
        kind, segment = action.kind, action.segment
        if kind == FORWARD:
            return Link("activation", segment) if segment + 1 < len(self.stage_of) else None
        loss = None if kind == WEIGHT_GRADIENT else self.route(action).sends
        return None if loss is None else Link("gradient", segment - 1, loss - (segment - 1))

    @cached_property
    def wiring(self) -> list[Wire]:
        """Every action, stage by stage in their order, with what it needs and gives."""
        number = {action: i for i, action in enumerate(self.actions())}
        wires = []
        for stage, actions in enumerate(self.stages):
            for action in actions:
                needs = [
                    (one, link if link and self.crosses_stages(link) else None)
                    for one, link in self.requires(action)
                ]
                link = self.sends(action)
                wires.append(
                    Wire(
                        stage,
                        action,
                        tuple(number[n] for n, via in needs if via is None and n in number),
                        tuple(number[n] for n, via in needs if via is not None and n in number),
                        tuple(via for _, via in needs if via is not None),
                        link if link and self.crosses_stages(link) else None,
                        tuple(need for need in needs if need[0] not in number)
                        if self.leads
                        else (),
                    )
                )
        return wires

    def crosses_stages(self, link: Link) -> bool:
        return self.stage_of[link.lower] != self.stage_of[link.lower + 1]

    @cached_property
    def _senders(self) -> dict[tuple[int, int, int], Action]:
        """(segment, micro-batch, loss) -> the action that sends this loss's gradient down from
        there."""
        return {
            (a.segment, a.micro_batch, loss): a
            for a in self.actions()
            if a.kind in (BACKWARD, INPUT_GRADIENT) and (loss := self.route(a).sends) is not None
        }

    @cached_property
    def _receivers(self) -> dict[tuple[int, int, int], Action]:
        """(segment, micro-batch, loss) -> the first action there that reads this loss's
        gradient."""
        receivers: dict[tuple[int, int, int], Action] = {}
        for action in self.actions():
            if action.kind in (BACKWARD, INPUT_GRADIENT):
                for loss, _ in self.route(action).reads:
                    receivers.setdefault((action.segment, action.micro_batch, loss), action)
        return receivers

    def actions(self) -> Iterator[Action]:
        for stage in self.stages:
            yield from stage

    @cached_property
    def last_use(self) -> frozenset[Action]:
        """The actions after which nothing of their micro-batch is alive in their segment any
        more."""
        last = {(a.segment, a.micro_batch, a.ahead): a for a in self.actions()}.values()
        return frozenset(a for a in last if a.kind != FORWARD or not self._passes_of(a))

    def _passes_of(self, action: Action) -> tuple[Pass, ...]:
        return self.rows[action.micro_batch].passes[action.segment]

    @cached_property
    def peak_live(self) -> tuple[int, ...]:
        """Per stage the largest number of micro-batches (of one segment each) whose activations are
        alive at once."""
        peaks = []
        for number, stage in enumerate(self.stages):
            live = peak = self._live_before(number)
            for action in stage:
                live += action.kind == FORWARD
                peak = max(peak, live)
                live -= action in self.last_use
            peaks.append(peak)
        return tuple(peaks)

    def _live_before(self, stage: int) -> int:
        """Micro-batches that have run ahead on a stage when the step begins, and wait."""
        if not self.leads or self.is_first:
            return 0
        return sum(
            bool(self.rows[position % self.num_micro_batches].passes[segment])
            for segment, count in enumerate(self.leads)
            for position in range(count)
            if self.stage_of[segment] == stage
            and (self.steps_left is None or position < self.steps_left * self.num_micro_batches)
        )

    # --- steps whose forwards run ahead -----------------------------------------------------------

    @cached_property
    def steps_ahead(self) -> int:
        """The most steps that a forward runs ahead."""
        return -(-max(self.leads, default=0) // self.num_micro_batches)

    @property
    def delays(self) -> list[float]:
        """Of each segment: updates between the weights of a forward and the update that its
        gradient goes into, on average over the micro-batches."""
        return [lead / self.num_micro_batches for lead in self.leads or (0,) * len(self.stage_of)]

    def at(self, is_first: bool, steps_left: int | None = None) -> Schedule:
        """The schedule of a step of a stretch, at whose end nothing runs ahead.

        Args:
            is_first: the step is the first of the stretch.
            steps_left: of the stretch, this one included; None: more than matter.
        """
        if not self.leads:
            return self
        if steps_left is not None and steps_left > self.steps_ahead:
            steps_left = None
        key = is_first, steps_left
        if key not in self._ends:
            before = self.opening if is_first else ((),) * self.num_stages
            stages = tuple(
                tuple(a for a in (*first, *rest) if steps_left is None or a.ahead < steps_left)
                for first, rest in zip(before, self.stages, strict=True)
            )
            self._ends[key] = replace(
                self, stages=stages, opening=(), is_first=is_first, steps_left=steps_left
            )
        return self._ends[key]

    @cached_property
    def _ends(self) -> dict[tuple[bool, int | None], Schedule]:
        return {}

    @cached_property
    def peak_deferred(self) -> tuple[int, ...]:
        """Per stage the largest number of split passes with deferred weight gradients at once."""
        peaks = []
        for stage in self.stages:
            halves = {action[1:] for action in stage if action.kind == WEIGHT_GRADIENT}
            waiting = peak = 0
            for action in stage:
                waiting += (action.kind == INPUT_GRADIENT and action[1:] in halves) - (
                    action.kind == WEIGHT_GRADIENT
                )
                peak = max(peak, waiting)
            peaks.append(peak)
        return tuple(peaks)

    def message_counts(self) -> dict[str, int]:
        """Messages between stages in one step."""
        counts = {"activations": 0, "gradients": 0}
        for action in self.actions():
            link = self.sends(action)
            if link is not None and self.crosses_stages(link):
                counts[link.kind + "s"] += 1
        return counts


def listed(schedules: Schedule | Sequence[Schedule]) -> Sequence[Schedule]:
    return [schedules] if isinstance(schedules, Schedule) else schedules


def successive(schedules: Sequence[Schedule]) -> list[Schedule]:
    """The schedules of successive steps as they are run: equal ones that follow each other are a
    stretch, which begins and ends with nothing running ahead."""
    found: list[Schedule] = []
    for _, group in groupby(schedules, key=id):
        stretch = list(group)
        found += [s.at(number == 0, len(stretch) - number) for number, s in enumerate(stretch)]
    return found
