"""What a schedule costs: a schedule and a cost model in, a time line out.

`simulate` replays a `Schedule` (the same object the engine executes) with given times for forward,
input gradient, weight gradient, head and link, and reports makespan, steady period, idle share,
live micro-batches and messages. The times are plain numbers in any unit, or come from a profile
that `train.py --profile` has measured.

Pure Python.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_local.errors import ScheduleError
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.replay import Program, deadlock, replay
from ds_local.schedules.routes import Routes
from ds_local.schedules.run_ahead import copies_of
from ds_local.schedules.schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Event,
    Link,
    Schedule,
    listed,
    successive,
)

MAX_ROUNDS = 24  # of steps before a run must have settled, beyond the least


@dataclass(frozen=True)
class Costs:
    """Times per segment and micro-batch, all in one unit; one number stands for every segment."""

    forward: float | Sequence[float] = 1.0
    input_grad: float | Sequence[float] = 1.0
    weight_grad: float | Sequence[float] = 1.0
    head: float | Sequence[float] = (
        0.0  # auxiliary head with its loss and gradients; the last segment's readout is not one
    )
    link: float | Sequence[float] = (
        0.0  # time one message keeps the link above a segment busy, per direction
    )
    optimizer: float | Sequence[float] = (
        0.0  # reduction and optimizer step, once per step and segment
    )
    activation_bytes: float = 0.0  # of one message

    @classmethod
    def from_profile(cls, path: str | Path) -> Costs:
        """Costs that a run has measured (`profile.json`).

        Raises:
            ScheduleError: when the file holds something else.
        """
        try:
            profile = json.loads(Path(path).read_text())
            return cls(
                **{
                    name: profile["costs"][name]
                    for name in cls.__dataclass_fields__
                    if name in profile["costs"]
                }
            )
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ScheduleError(
                f"{path} is not a profile written by scripts/train.py --profile: {error}"
            ) from error

    def of(self, name: str, segment: int, last: bool = False) -> float:
        value = getattr(self, name)
        if isinstance(value, int | float):
            return 0.0 if name == "head" and last else float(value)
        return float(value[segment])


@dataclass
class Timeline:
    """The result of a simulation. Times are in the unit of the costs."""

    schedule: Schedule
    makespan: float  # of one step alone, from empty to empty
    # of a step in a long run; no stage waits for another between steps unless the routes demand it
    steady_period: float
    busy: list[float]  # per stage, in one step
    events: list[Event] = field(repr=False)  # of the step alone
    activation_bytes: float = 0.0

    @property
    def idle_share_of_stage(self) -> list[float]:
        """In the steady state."""
        return [max(0.0, 1 - busy / self.steady_period) for busy in self.busy]

    @property
    def idle_share(self) -> float:
        """Mean over the stages, in the steady state."""
        return sum(self.idle_share_of_stage) / len(self.busy)

    @property
    def idle_share_alone(self) -> float:
        """Of one step alone: the bubble that a flush after every step would leave."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy))

    def report(self) -> dict[str, Any]:
        messages = self.schedule.message_counts()
        return {
            "schedule": self.schedule.name,
            "stages": self.schedule.num_stages,
            "micro_batches": self.schedule.num_micro_batches,
            "makespan": self.makespan,
            "steady_period": self.steady_period,
            "idle_share": self.idle_share,
            "idle_share_of_stage": self.idle_share_of_stage,
            "idle_share_alone": self.idle_share_alone,
            "peak_live_micro_batches": list(self.schedule.peak_live),
            "delay_steps": _by_stage(self.schedule, self.schedule.delays),
            "weight_copies": _by_stage(self.schedule, copies_of(self.schedule)),
            "messages": messages,
            "bytes": sum(messages.values()) * self.activation_bytes,
        }


def _by_stage(schedule: Schedule, figures: Sequence[float]) -> list[float]:
    """The largest of a stage's segments."""
    return [
        max(figure for figure, at in zip(figures, schedule.stage_of, strict=True) if at == stage)
        for stage in range(schedule.num_stages)
    ]


def simulate(
    schedules: Schedule | Sequence[Schedule], costs: Costs, link_depth: int | None = None
) -> Timeline:
    """Replay a step with `costs`, once alone and then for several steps until the period settles.

    Args:
        schedules: of a step, or of successive steps that differ (shifted chunks) and start over
            after the last.

    Raises:
        ScheduleError: when the schedule deadlocks at this link depth, or all costs are 0.
    """
    schedules = listed(schedules)
    first = schedules[0]
    cost = _costs_of_actions(costs)

    def link_time(link: Link) -> float:
        return costs.of("link", link.lower)

    alone, stuck = replay(first, cost, link_time, link_depth)
    if stuck is not None:
        raise deadlock(first, stuck, link_depth)
    makespan = max(e.end for e in alone)
    if makespan <= 0:
        raise ScheduleError("all costs are 0; give at least --forward a time")
    busy = [
        sum(cost(schedule, action) for schedule in schedules for action in schedule.stages[stage])
        / len(schedules)
        for stage in range(first.num_stages)
    ]
    return Timeline(
        first,
        makespan,
        StepTimer(schedules, link_depth).steady_period(costs),
        busy,
        alone,
        costs.activation_bytes,
    )


def several_steps(
    schedules: Schedule | Sequence[Schedule],
    costs: Costs,
    steps: int,
    link_depth: int | None = None,
) -> list[Event]:
    """What every stage does in the first steps of a run, and when; as `simulate` otherwise."""
    schedules = listed(schedules)
    events, stuck = replay(
        schedules,
        _costs_of_actions(costs),
        lambda link: costs.of("link", link.lower),
        link_depth,
        steps,
    )
    if stuck is not None:
        raise deadlock(schedules[0], stuck, link_depth)
    return events


def _costs_of_actions(costs: Costs) -> Callable[[Schedule, Action], float]:
    """What `replay` asks for, worked out once for each schedule."""
    known: dict[int, tuple[Schedule, dict[Action, float]]] = {}

    def cost(schedule: Schedule, action: Action) -> float:
        if id(schedule) not in known:
            known[id(schedule)] = schedule, _action_costs(schedule, costs)
        return known[id(schedule)][1][action]

    return cost


def _action_costs(schedule: Schedule, costs: Costs) -> dict[Action, float]:
    """Time of every action; a stage's last one also pays for its optimizer step."""
    parts = {
        FORWARD: ("forward",),
        BACKWARD: ("input_grad", "weight_grad"),
        INPUT_GRADIENT: ("input_grad",),
        WEIGHT_GRADIENT: ("weight_grad",),
    }
    times = {
        a: sum(costs.of(part, a.segment) for part in parts[a.kind]) for a in schedule.actions()
    }
    last = len(schedule.stage_of) - 1
    for action in _first_reader_of_own_loss(schedule):
        times[action] += costs.of("head", action.segment, action.segment == last)
    for stage, actions in enumerate(schedule.stages):
        times[actions[-1]] += sum(
            costs.of("optimizer", s) for s, p in enumerate(schedule.stage_of) if p == stage
        )
    return times


def _first_reader_of_own_loss(schedule: Schedule) -> set[Action]:
    """The actions that also run their segment's head: its loss is computed where its gradient is
    first needed."""
    readers: dict[tuple[int, int], Action] = {}
    for action in schedule.actions():
        if action.kind in (BACKWARD, INPUT_GRADIENT) and any(
            loss == action.segment for loss, _ in schedule.route(action).reads
        ):
            readers.setdefault((action.segment, action.micro_batch), action)
    return set(readers.values())


def _least_rounds(schedule: Schedule) -> int:
    """Steps before a run may have settled. Chunks fall behind each other one by one, at an even
    pace while it lasts."""
    cut = [
        schedule.stage_of[link.lower]
        for link in map(schedule.sends, schedule.actions())
        if link and link.kind == "gradient"
    ]
    chunks = 0 < len(set(cut)) < schedule.num_stages - 1
    return (max(4, schedule.num_stages) if chunks else 4) + schedule.steps_ahead


class StepTimer:
    """`Timeline.steady_period` of one schedule under many costs: what waits for what is found once.

    Args:
        schedules: of a step, or of successive steps that differ and start over after the last.
        link_depth: as in `simulate`.

    Raises:
        ScheduleError: when the schedules deadlock at this link depth.
    """

    def __init__(
        self, schedules: Schedule | Sequence[Schedule], link_depth: int | None = None
    ) -> None:
        self._schedules = listed(schedules)
        self._least = _least_rounds(self._schedules[0])
        # without a limit on links, rounds depend on each other by the clocks of stages and links
        # only, so one round serves all; with one, a round waits for messages taken in another, and
        # where forwards run ahead, for forwards of another
        apart = link_depth is None and not any(one.leads for one in self._schedules)
        self._draining = self._schedules[0].steps_ahead  # rounds at the end, not as those before
        together = 1 if apart else self._least + MAX_ROUNDS + self._draining
        self._program = Program(successive([*self._schedules] * together), link_depth)
        if self._program.stuck is not None:
            raise deadlock(self._schedules[0], self._program.stuck, link_depth)

    def steady_period(self, costs: Costs) -> float:
        """How much later a step ends than the one before it, once the run has settled."""
        program, cycle = self._program, len(self._schedules)
        cost = _costs_of_actions(costs)
        seconds = [cost(program.schedules[work.step], work.action) for work in program.work]
        link_seconds = [costs.of("link", link.lower) for link in program.links]
        clocks = program.clocks_at_rest()
        ends: list[float] = []
        while len(ends) < self._least + MAX_ROUNDS:
            spans = program.spans(seconds, link_seconds, clocks)
            latest = [0.0] * (len(program.schedules) // cycle)
            for work, (_, end) in zip(program.work, spans, strict=True):
                latest[work.step // cycle] = max(latest[work.step // cycle], end)
            ends += latest[: len(latest) - self._draining]
            if len(ends) >= self._least:
                before, last = ends[-2] - ends[-3], ends[-1] - ends[-2]
                if abs(last - before) < 1e-6 * last:
                    break
        return (ends[-1] - ends[-2]) / cycle


def most_without_idling(
    first: Routes,
    second: Routes,
    num_micro_batches: int,
    transfer: float = 0.0,
    split_backward: int = 0,
) -> int:
    """How many micro-batches of a step may follow the row `first` before the pipeline is slower
    than if all followed `second`.

    One segment a stage, forward and both parts of the backward one unit each, heads free; so it
    depends on the model's segments alone. 0 when even one is too many.

    Args:
        transfer: time of a message, in forwards.
        split_backward: see `list_scheduler.make_schedule`.
    """

    def period(count: int) -> float:
        mix = [(first, count), (second, num_micro_batches - count)]
        schedule = make_schedule(mix, first.num_segments, transfer, split_backward)
        return StepTimer(schedule).steady_period(Costs(link=transfer))

    limit = period(0) * (1 + 1e-9)
    return bisect_right(range(1, num_micro_batches), limit, key=period)
