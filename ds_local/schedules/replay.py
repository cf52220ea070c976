"""Runs schedules in model time: what `validate` proves and the printed grids show comes from
here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from ds_local.errors import ScheduleError
from ds_local.schedules.cells import cell_of, halves_of
from ds_local.schedules.schedule import (
    BACKWARD,
    FORWARD,
    WEIGHT_GRADIENT,
    Action,
    Event,
    Link,
    Schedule,
    Wire,
    listed,
    successive,
)


def unit_cost(action: Action) -> float:
    """Forward, input gradient and weight gradient take one tick each."""
    return 2.0 if action.kind == BACKWARD else 1.0


def deadlock(schedule: Schedule, stuck: str, depth: int | None, remedy: str = "") -> ScheduleError:
    """What to raise where `replay` or a `Program` says what it is stuck at."""
    return ScheduleError(f"{schedule.name}: {stuck}; links hold {depth} messages{remedy}")


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
        The events in an order in which they can happen, and None, or a sentence naming what each
        stage waits for when nothing can go on.
    """
    schedules = listed(schedules)
    in_turn = [schedules[step % len(schedules)] for step in range(steps)]
    program = Program(successive(in_turn), link_depth)
    seconds = [cost(program.schedules[work.step], work.action) for work in program.work]
    spans = program.spans(
        seconds, [link_time(link) for link in program.links], program.clocks_at_rest()
    )
    return [
        Event(work.stage, work.step, work.action, *span)
        for work, span in zip(program.work, spans, strict=True)
    ], program.stuck


class Work(NamedTuple):
    """An action of one step, and what it needs as positions in `Program.work`."""

    stage: int
    step: int
    action: Action
    own: tuple[int, ...]  # results of its own segment
    received: tuple[int, ...]  # results of neighbouring segments
    gate: int  # who must have taken a message before the result before this one fits on its link
    link: int = -1  # position in `Program.links` of where its result goes; -1: nowhere


class Clocks(NamedTuple):
    """When stages and links are free."""

    stages: list[float]
    links: list[float]


class Program:
    """Successive steps as one list of work, in an order in which it can run whatever it takes.

    The order of each stage is fixed, so what waits for what does not depend on times: the list is
    made once, and `spans` walks it for any costs. `stuck` says what each stage waits for when not
    all work can run, else it is None.

    Args:
        schedules: of the steps, one each, as they are run (`successive`).
        link_depth: messages a link between stages holds before its sender has to wait; None: no
            limit.
    """

    def __init__(self, schedules: Sequence[Schedule], link_depth: int | None = None) -> None:
        self.schedules = schedules
        self.work: list[Work] = []
        self.links: list[Link] = []  # between stages, in the order in which they are first used
        self._depth = link_depth
        # actions of all steps are numbered through
        starts = [0, *accumulate(len(schedule.wiring) for schedule in schedules)]
        self._wires = [
            (step, start, wire)
            for step, (start, schedule) in enumerate(zip(starts, schedules, strict=False))
            for wire in schedule.wiring
        ]
        self._queues: list[list[int]] = [[] for _ in range(schedules[0].num_stages)]
        self._takers: dict[Link, list[int]] = defaultdict(list)  # of messages, in their order
        # (step, forward) -> number, where forwards may be needed in other steps
        self._forwards: dict[tuple[int, Action], int] = {}
        for number, (step, _, wire) in enumerate(self._wires):
            self._queues[wire.stage].append(number)
            if wire.action.kind == FORWARD and schedules[step].leads:
                self._forwards[_of_step(step, wire.action)] = number
            for link in wire.taken:
                self._takers[link].append(number)
        self.stuck = self._arrange()

    def clocks_at_rest(self) -> Clocks:
        return Clocks([0.0] * len(self._queues), [0.0] * len(self.links))

    def spans(
        self, seconds: Sequence[float], link_seconds: Sequence[float], clocks: Clocks
    ) -> list[tuple[float, float]]:
        """(start, end) of every piece of work.

        Args:
            seconds: of each piece of work.
            link_seconds: time a message keeps each link busy.
            clocks: from when on stages and links are free; moved on, so that another round may
                follow.
        """
        stages, links = clocks
        spans: list[tuple[float, float]] = []
        there: list[float] = []  # when each result is at its receiver
        for work, length in zip(self.work, seconds, strict=True):
            start = stages[work.stage]
            if work.gate >= 0:
                start = max(start, spans[work.gate][0])
            for other in work.own:
                start = max(start, spans[other][1])
            for other in work.received:
                start = max(start, there[other])
            end = arrival = start + length
            if work.link >= 0:
                arrival = links[work.link] = max(end, links[work.link]) + link_seconds[work.link]
            spans.append((start, end))
            there.append(arrival)
            stages[work.stage] = end
        return spans

    def _needs(self, step: int, start: int, wire: Wire) -> tuple[list[int], list[int]]:
        """Numbers of what an action needs, of its own stage and of others."""
        own, received = [start + n for n in wire.own], [start + n for n in wire.received]
        for action, link in wire.elsewhere:
            number = self._forwards[_of_step(step, action)]
            (own if link is None else received).append(number)
        return own, received

    def _arrange(self) -> str | None:
        """Let every stage go as far as it gets; who has to wait is woken by what it waits for."""
        place = [-1] * len(self._wires)  # in `work`, of what has run
        left = bytearray(len(self._wires))  # has its result gone out, too?
        sent: dict[Link, int] = {}
        on: dict[Link, int] = {}  # position in `links`
        until_run: dict[int, list[int]] = {}  # what is waited for -> stages
        until_left: dict[int, list[int]] = {}
        position, gate = [0] * len(self._queues), [-1] * len(self._queues)
        runnable = list(range(len(self._queues)))
        while runnable:
            stage = runnable.pop()
            queue = self._queues[stage]
            while position[stage] < len(queue):
                number = queue[position[stage]]
                step, start, wire = self._wires[number]
                if place[number] < 0:
                    needs, sent_needs = self._needs(step, start, wire)
                    missing = [n for n in needs if place[n] < 0]
                    missing += [n for n in sent_needs if not left[n]]
                    if missing:
                        until_left.setdefault(missing[0], []).append(stage)
                        break
                    place[number] = len(self.work)
                    own = tuple([place[n] for n in needs])
                    received = tuple([place[n] for n in sent_needs])
                    link = -1
                    if wire.link is not None:
                        link = on.setdefault(wire.link, len(on))
                    self.work.append(
                        Work(stage, step, wire.action, own, received, gate[stage], link)
                    )
                    gate[stage] = -1
                    runnable += until_run.pop(number, ())
                if wire.link is not None:
                    count = sent.get(wire.link, 0)
                    if self._depth is not None and count >= self._depth:
                        taker = self._takers[wire.link][count - self._depth]
                        if place[taker] < 0:
                            until_run.setdefault(taker, []).append(stage)
                            break
                        gate[stage] = place[taker]
                    sent[wire.link] = count + 1
                left[number] = True
                runnable += until_left.pop(number, ())
                position[stage] += 1
        self.links = list(on)
        blocked = []
        self.blocked: list[Action] = []  # what each stage waits with, where it does
        for stage, (queue, at) in enumerate(zip(self._queues, position, strict=True)):
            if at < len(queue):
                step, _, wire = self._wires[queue[at]]
                self.blocked.append(wire.action)
                what = "for the inputs" if place[queue[at]] < 0 else "to send the result"
                blocked.append(
                    f"stage {stage} waits {what} of {wire.action} (segment {wire.action.segment}, "
                    f"step {step})"
                )
        return "deadlock: " + "; ".join(blocked) if blocked else None


def _of_step(step: int, action: Action) -> tuple[int, Action]:
    """An action with the step that its micro-batch belongs to, whenever it is run."""
    return step + action.ahead, action._replace(ahead=0)


def validate(schedules: Schedule | Sequence[Schedule], link_depth: int) -> None:
    """Prove that schedules are complete and that no run through them can deadlock at this link
    depth.

    Args:
        schedules: of successive steps or phases; each may be repeated before the next one follows.

    Raises:
        ScheduleError: with a sentence and the grid.
    """
    schedules = listed(schedules)
    for schedule in schedules:
        for steps_left in (None, *range(1, schedule.steps_ahead + 1)):
            for is_first in (True, False) if schedule.leads else (True,):
                _check_complete(schedule.at(is_first, steps_left))
        # a step waits for nothing of a later one: messages are taken in the step they are sent in,
        # so each step that ends alone ends after any others; where forwards run ahead it meets
        # links that the steps before have left full
        steps = 2 + 2 * schedule.steps_ahead if schedule.leads else 1
        stuck = Program(successive([schedule] * steps), link_depth).stuck
        if stuck is not None:
            remedy = f", raise link.depth\n{grid_of(schedule)}"
            raise deadlock(schedule, stuck, link_depth, remedy)


def expected_actions(schedule: Schedule) -> set[Action]:
    """What the rows of a schedule demand; a pass is split where its second half is listed."""
    halves = {action[1:4] for action in schedule.actions() if action.kind == WEIGHT_GRADIENT}
    expected = set(_forwards_of(schedule))
    for micro_batch, routes in enumerate(schedule.rows):
        for segment, passes in enumerate(routes.passes):
            for which, one in enumerate(passes):
                split = (segment, micro_batch, which) in halves
                expected.update(Action.of_pass(one, segment, micro_batch, which, split))
    return expected


def _check_complete(schedule: Schedule) -> None:
    found, expected = list(schedule.actions()), expected_actions(schedule)
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


def _forwards_of(schedule: Schedule) -> Iterator[Action]:
    """Those of a step and, where they run ahead, of later ones."""
    count, left = schedule.num_micro_batches, schedule.steps_left
    for segment in range(len(schedule.stage_of)):
        lead = schedule.leads[segment] if schedule.leads else 0
        for position in range(0 if schedule.is_first else lead, count + lead):
            ahead, micro_batch = divmod(position, count)
            if left is None or ahead < left:
                yield Action(FORWARD, segment, micro_batch, ahead=ahead)


def grid_of(schedule: Schedule) -> str:
    """The grid of one step at unit costs, or of as many as show how forwards run ahead, with a
    sentence below it if it gets stuck."""
    steps = 1 + 2 * schedule.steps_ahead
    events, stuck = replay(schedule, steps=steps)
    return _grid(schedule, events, steps) + ("" if stuck is None else f"\n{stuck}")


def _grid(schedule: Schedule, events: list[Event], steps: int) -> str:
    """One row per stage, one column per tick of unit cost; `.` is idle, `'` the second tick of a
    backward; a `+` for each step that a forward is ahead."""
    if not events:
        return "(empty schedule)"
    makespan = int(max(e.end for e in events))
    several, halves = len(schedule.stage_of) > schedule.num_stages, halves_of(schedule)
    cells = [["."] * makespan for _ in range(schedule.num_stages)]
    for stage, _, action, start, end in events:
        label = cell_of(schedule, action, halves, several)
        for tick in range(int(start), int(end)):
            cells[stage][tick] = label if tick == start else "'"
    width = max(len(c) for row in cells for c in row)
    busy = sum(e.end - e.start for e in events)
    idle = 1 - busy / (makespan * schedule.num_stages)
    size = f"{schedule.num_stages} stages, {schedule.num_micro_batches} micro-batches"
    size += f", {steps} steps" if steps > 1 else ""
    head = f"{schedule.name}: {size}, {makespan} ticks, idle {idle:.0%}"
    return "\n".join(
        [head]
        + [
            f"stage {s}  " + " ".join(c.ljust(width) for c in row).rstrip()
            for s, row in enumerate(cells)
        ]
    )
