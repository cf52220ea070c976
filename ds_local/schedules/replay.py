"""Runs schedules in model time: what `validate` proves and the printed grids show comes from
here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ds_local.errors import ScheduleError
from ds_local.schedules.schedule import (
    BACKWARD,
    FORWARD,
    WEIGHT_GRADIENT,
    Action,
    Event,
    Link,
    Schedule,
)


def unit_cost(action: Action) -> float:
    """Forward, input gradient and weight gradient take one tick each."""
    return 2.0 if action.kind == BACKWARD else 1.0


def replay(
    schedules: Schedule | Sequence[Schedule],
    cost: Callable[[Schedule, Action], float] = lambda schedule, action: unit_cost(action),
    link_time: Callable[[Link], float] = lambda link: 0.0,
    link_depth: int | None = None,
    steps: int = 1,
) -> tuple[list[Event], str | None]:
    """Run schedules in model time: every stage does its actions in order, each as early as its
    inputs allow.

    Args:
        schedules: of successive optimizer steps; they start over when there are more steps.
        cost: time of an action.
        link_time: time a message keeps its link busy; links between segments of one stage are free.
        link_depth: messages a link between stages holds before its sender has to wait; None: no
            limit.
        steps: optimizer steps to run one after another. No stage waits for another between them.

    Returns:
        The events in the order they were found, and None, or a sentence naming what each stage
        waits for when nothing can go on.
    """
    schedules = [schedules] if isinstance(schedules, Schedule) else schedules
    run = _Replay(
        [schedules[step % len(schedules)] for step in range(steps)], cost, link_time, link_depth
    )
    run.run()
    return run.events, run.stuck()


class _Replay:
    """The state of one `replay`: for each stage its clock and its next piece of work, for each link
    what is on it."""

    def __init__(
        self,
        schedules: Sequence[Schedule],
        cost: Callable[[Schedule, Action], float],
        link_time: Callable[[Link], float],
        depth: int | None,
    ) -> None:
        self.schedules, self.cost, self.link_time, self.depth = schedules, cost, link_time, depth
        self.events: list[Event] = []
        self.done: dict[
            tuple[int, Action], float
        ] = {}  # (step, action) -> when its result is there, on its own segment
        self.arrived: dict[tuple[int, Action], float] = {}  # ... at the other end of its link
        self.consumed: dict[Link, list[float]] = defaultdict(
            list
        )  # when each message was taken off its link
        self.sent: dict[Link, int] = defaultdict(int)
        self.link_free: dict[Link, float] = defaultdict(float)
        num_stages = schedules[0].num_stages
        self.crosses_stages = schedules[0].crosses_stages  # the same in all steps
        self.clock = [0.0] * num_stages
        self.programs = [_program(schedules, stage) for stage in range(num_stages)]
        self.next = [next(program, None) for program in self.programs]
        self.waiting: dict[tuple, list[int]] = defaultdict(list)  # what a stage waits for -> stages
        self.runnable = list(range(num_stages))

    def run(self) -> None:
        while self.runnable:
            stage = self.runnable.pop()
            while (work := self.next[stage]) is not None:
                missing = self._missing_for(work)
                if missing is not None:
                    self.waiting[missing].append(stage)
                    break
                self._send(stage, work) if work.link is not None else self._compute(stage, work)
                self.next[stage] = next(self.programs[stage], None)

    def _missing_for(self, work: _Work) -> tuple | None:
        """What must happen before this piece of work, as a key of `waiting`."""
        step, action, link = work
        if link is not None:
            full = self.depth is not None and self.crosses_stages(link)
            number = self.sent[link] - (self.depth or 0)
            return ("taken", link, number) if full and number >= len(self.consumed[link]) else None
        for required, via in self.schedules[step].requires(action):
            if (step, required) not in (self.arrived if via else self.done):
                return step, required
        return None

    def _send(self, stage: int, work: _Work) -> None:
        step, action, link = work
        assert link is not None, "told apart by the caller"
        crosses = self.crosses_stages(link)
        start = max(self.done[step, action], self.link_free[link])
        self.link_free[link] = self.arrived[step, action] = start + (
            self.link_time(link) if crosses else 0.0
        )
        number = self.sent[link] - (self.depth or 0)
        if crosses and self.depth is not None and number >= 0:
            self.clock[stage] = max(self.clock[stage], self.consumed[link][number])
        self.sent[link] += 1
        self._wake((step, action))

    def _compute(self, stage: int, work: _Work) -> None:
        step, action, _ = work
        required = self.schedules[step].requires(action)
        start = max(
            [
                self.clock[stage],
                *((self.arrived if via else self.done)[step, r] for r, via in required),
            ]
        )
        for _, via in required:
            if via is not None:
                self.consumed[via].append(start)
                self._wake(("taken", via, len(self.consumed[via]) - 1))
        self.clock[stage] = self.done[step, action] = start + self.cost(
            self.schedules[step], action
        )
        self.events.append(Event(stage, step, action, start, self.clock[stage]))
        self._wake((step, action))

    def _wake(self, key: tuple) -> None:
        self.runnable.extend(self.waiting.pop(key, ()))

    def stuck(self) -> str | None:
        blocked = [
            f"stage {stage} waits {'for the inputs of' if work.link is None else 'to send the result of'} "
            f"{work.action} (segment {work.action.segment}, step {work.step})"
            for stage, work in enumerate(self.next)
            if work is not None
        ]
        return "deadlock: " + "; ".join(blocked) if blocked else None


class _Work(NamedTuple):
    """A piece of a stage's program: compute an action, or (with a link) send its result."""

    step: int
    action: Action
    link: Link | None


def _program(schedules: Sequence[Schedule], stage: int) -> Iterator[_Work]:
    for step, schedule in enumerate(schedules):
        for action in schedule.stages[stage]:
            yield _Work(step, action, None)
            link = schedule.sends(action)
            if link is not None:
                yield _Work(step, action, link)


def validate(schedules: Schedule | Sequence[Schedule], link_depth: int) -> None:
    """Prove that schedules are complete and that no run through them can deadlock at this link
    depth.

    Args:
        schedules: of successive steps or phases; each may be repeated before the next one follows.

    Raises:
        ScheduleError: with a sentence and the grid.
    """
    schedules = [schedules] if isinstance(schedules, Schedule) else schedules
    for schedule in schedules:
        _check_complete(schedule)
    # every schedule after itself and after the one before it: a step meets links that the step
    # before has left full
    twice = [schedule for schedule in schedules for _ in range(2)]
    _, stuck = replay(twice, link_depth=link_depth, steps=len(twice) + 1)
    if stuck is not None:
        grids = "\n".join(map(grid_of, schedules))
        raise ScheduleError(
            f"{schedules[0].name}: {stuck}; links hold {link_depth} messages, raise link.depth\n{grids}"
        )


def _check_complete(schedule: Schedule) -> None:
    found = list(schedule.actions())
    halves = {action[1:] for action in found if action.kind == WEIGHT_GRADIENT}
    expected = {
        Action(FORWARD, segment, micro_batch)
        for micro_batch in range(schedule.num_micro_batches)
        for segment in range(len(schedule.stage_of))
    }
    for micro_batch, routes in enumerate(schedule.rows):
        for segment, passes in enumerate(routes.passes):
            for which, one in enumerate(passes):
                expected.update(
                    Action.of_pass(
                        one, segment, micro_batch, which, (segment, micro_batch, which) in halves
                    )
                )
    if len(found) != len(set(found)) or set(found) != expected:
        odd = sorted(set(found) ^ expected) or sorted({a for a in found if found.count(a) > 1})
        raise ScheduleError(
            f"{schedule.name}: actions missing, unknown or double: {', '.join(map(repr, odd[:5]))}"
        )
    for stage, actions in enumerate(schedule.stages):
        for action in actions:
            if schedule.stage_of[action.segment] != stage:
                raise ScheduleError(
                    f"{schedule.name}: {action!r} is listed on stage {stage}, not on its own"
                )


def grid_of(schedule: Schedule) -> str:
    """The grid of one step at unit costs, with a sentence below it if it gets stuck."""
    events, stuck = replay(schedule)
    return _grid(schedule, events) + ("" if stuck is None else f"\n{stuck}")


def _grid(schedule: Schedule, events: list[Event]) -> str:
    """One row per stage, one column per tick of unit cost; `.` is idle, `'` the second tick of a
    backward."""
    if not events:
        return "(empty schedule)"
    makespan = int(max(e.end for e in events))
    several = len(schedule.stage_of) > schedule.num_stages
    cells = [["."] * makespan for _ in range(schedule.num_stages)]
    for stage, _, action, start, end in events:
        label = f"{action.segment}{action}" if several else str(action)
        for tick in range(int(start), int(end)):
            cells[stage][tick] = label if tick == start else "'"
    width = max(len(c) for row in cells for c in row)
    busy = sum(e.end - e.start for e in events)
    idle = 1 - busy / (makespan * schedule.num_stages)
    size = f"{schedule.num_stages} stages, {schedule.num_micro_batches} micro-batches"
    head = f"{schedule.name}: {size}, {makespan} ticks, idle {idle:.0%}"
    return "\n".join(
        [head]
        + [
            f"stage {s}  " + " ".join(c.ljust(width) for c in row).rstrip()
            for s, row in enumerate(cells)
        ]
    )
