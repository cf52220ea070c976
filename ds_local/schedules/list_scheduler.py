"""In which order a stage computes: list scheduling of the passes that the routes demand.

A stage that is free takes the most urgent piece of work whose inputs are there: a forward as long
as few micro-batches are alive (one for each stage up to the furthest loss: 1 for local training,
the usual 1F1B bound for backpropagation), then a gradient pass that sends, then one that does not;
earlier micro-batches first. The unit costs used here only order the work; the result is a fixed
list, the same on every machine whatever its speed.

The micro-batches of one step may follow different rows ("mixed"). Those of the first row go first,
as far as memory allows; the later rows fill the time until their gradients come back. There a pass
that sends goes before a forward, and a forward may exceed its bound rather than leave the stage
idle: the bound on segment 0 holds for all. The order in which a segment adds up the gradients of
such a step is decided for one segment per stage and kept for every other layout, so that K segments
give the same bits on 1, 2 or K ranks.

With `split_backward` a pass that trains weights and sends a gradient is cut in two: the input
gradient, sent at once, and the weight gradients, which fill the time in which the stage would wait.
A stage defers as many as there are stages below it to wait for the gradient (ZB-H1 for
backpropagation), or twice as many and runs as much further ahead (ZB-H2; Qi et al. 2024, arXiv
2401.10241).

Pure Python: no torch, no DeepSpeed.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from ds_local.errors import ScheduleError
from ds_local.schedules.replay import unit_cost
from ds_local.schedules.routes import Routes
from ds_local.schedules.schedule import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Schedule

Mix = Sequence[tuple[Routes, int]]  # (row, how many micro-batches of the step follow it)


def make_schedule(
    mix: Mix, num_stages: int, transfer: float = 0.0, split_backward: int = 0
) -> Schedule:
    """Order one optimizer step.

    Args:
        mix: the rows of the step's micro-batches, those that should go first at the front.
        num_stages: the segments are dealt to the stages in order, evenly.
        transfer: time from one stage to the next, in forwards, to be reckoned with.
        split_backward: defer the weight gradients of passes that send: 0 not; 1 in the memory of
            1F1B's first stage, on all stages; 2 in twice that.

    Raises:
        ScheduleError: when the rows disagree on the number of segments or it is not a multiple of
            `num_stages`.
    """
    mix, name, stage_of = deal(mix, num_stages)
    if len(mix) > 1 and num_stages < len(stage_of):
        template = _ListScheduler(mix, tuple(range(len(stage_of))), transfer, split_backward)
        template.run()
        scheduler = _ListScheduler(mix, stage_of, transfer, split_backward, template)
    else:
        scheduler = _ListScheduler(mix, stage_of, transfer, split_backward)
    scheduler.run()
    return Schedule(
        name,
        tuple(map(tuple, scheduler.order)),
        stage_of,
        tuple(mix[row][0] for row in scheduler.row_of),
    )


def deal(mix: Mix, num_stages: int) -> tuple[Mix, str, tuple[int, ...]]:
    """(the rows that some micro-batch follows, their name, segment -> stage).

    Raises:
        ScheduleError: when the rows disagree on the number of segments or it is not a multiple of
            `num_stages`.
    """
    mix = [(routes, count) for routes, count in mix if count > 0]
    num_segments = mix[0][0].num_segments
    if any(routes.num_segments != num_segments for routes, _ in mix) or num_segments % num_stages:
        raise ScheduleError(
            f"{num_segments} segments cannot be dealt evenly to {num_stages} stages"
        )
    name = (
        " + ".join(f"{count} x {routes.mode}" for routes, count in mix)
        if len(mix) > 1
        else mix[0][0].mode
    )
    return mix, name, tuple(segment * num_stages // num_segments for segment in range(num_segments))


class _ListScheduler:
    """One event-driven run. With a `template` it keeps that run's rows, memory bounds and order of
    sums."""

    def __init__(
        self,
        mix: Mix,
        stage_of: tuple[int, ...],
        transfer: float,
        split: int,
        template: _ListScheduler | None = None,
    ) -> None:
        self.mix = mix
        self.transfer = transfer
        self.split = split
        self.stage_of = stage_of
        self.mixed = len(mix) > 1
        num_segments, num_stages = len(stage_of), stage_of[-1] + 1
        self.segments = [
            [s for s in reversed(range(num_segments)) if stage_of[s] == p]
            for p in range(num_stages)
        ]
        self.order: list[list[Action]] = [[] for _ in range(num_stages)]
        # what a segment adds up (the gradients of its weights, deferred ones, those of its head) ->
        # micro-batches in the order in which they are added
        self.sums: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.required_sums = template.sums if template else None
        self.row_of: list[int] = (
            list(template.row_of) if template else []
        )  # micro-batch -> row, chosen when segment 0 takes it
        self.remaining = [0] * len(mix) if template else [count for _, count in mix]
        self.bound: list[int] = template.peak if template else [sum(self.remaining)] * num_segments
        self.num_micro_batches = sum(count for _, count in mix)
        self.inputs_there = [
            self.num_micro_batches if self._has_all_inputs(segment) else 0
            for segment in range(num_segments)
        ]
        self.forwarded = [0] * num_segments
        self.live = [[0] * len(mix) for _ in stage_of]  # per segment and row
        self.peak: list[int] = [0] * num_segments
        self.passes_left: dict[tuple[int, int], int] = {}  # (segment, micro-batch)
        self.missing: dict[Action, int] = {}  # inputs a pass still waits for
        # by (segment, micro-batch, loss)
        self.readers: dict[tuple[int, int, int], list[Action]] = defaultdict(list)
        # heaps of passes whose inputs are there, most urgent first
        self.ready: list[list[tuple[bool, int, int, int, Action]]] = [[] for _ in range(num_stages)]
        # weight gradients
        self.deferred: list[deque[Action]] = [deque() for _ in range(num_stages)]
        self.busy = [False] * num_stages
        # heap of (time, is it the arrival of a result at the stage rather than the end of its
        # computation?, stage, action)
        self.events: list[tuple[float, bool, int, Action]] = []

    def _has_all_inputs(self, segment: int) -> bool:
        """Are its inputs always there? The first segment's are; in a long run those of a stage that
        none below waits for, too."""
        if segment == 0:
            return True
        first_of_stage = self.stage_of[segment - 1] != self.stage_of[segment]
        return first_of_stage and not self.mixed and not self.mix[0][0].messages(segment)

    def run(self) -> None:
        now, free = 0.0, set(range(len(self.order)))
        while True:
            for stage in sorted(free):
                action = None if self.busy[stage] else self._most_urgent(stage)
                if action is not None:
                    self.order[stage].append(action)
                    self.busy[stage] = True
                    heapq.heappush(self.events, (now + unit_cost(action), False, stage, action))
            if not self.events:
                return
            now, free = self.events[0][0], set()
            while self.events and self.events[0][0] == now:
                _, arrival, stage, action = heapq.heappop(self.events)
                free.add(stage)
                if arrival:
                    self._deliver(action)
                    continue
                self.busy[stage] = False
                self._finish(action)
                target = self._target(action)
                if target == stage or not self.transfer:
                    self._deliver(action)
                    free.add(target)
                else:
                    heapq.heappush(self.events, (now + self.transfer, True, target, action))

    def _most_urgent(self, stage: int) -> Action | None:
        limit = self.split * self._stages_waiting(stage) * len(self.segments[stage])
        if len(self.deferred[stage]) > limit and (action := self._take_deferred(stage)):
            return action
        if self.mixed:
            return (
                self._take_pass(stage, silent=False)
                or self._take_forward(stage, self._within_reach)
                or self._take_pass(stage, silent=True)
                or self._take_deferred(stage)
                or self._take_forward(stage, self._within_bound)
            )
        return (
            self._take_forward(stage, self._within_reach)
            or self._take_pass(stage, silent=True)
            or self._take_deferred(stage)
        )

    def _stages_waiting(self, stage: int) -> int:
        """How many stages below wait for the input gradient that goes with the oldest deferred
        weight gradient."""
        if not self.deferred[stage]:
            return 0
        action = self.deferred[stage][0]
        routes = self.mix[self.row_of[action.micro_batch]][0]
        lowest = action.segment
        while lowest and routes.messages(lowest):
            lowest -= 1
        return stage - self.stage_of[lowest]

    def _take_forward(self, stage: int, room: Callable[[int, int], bool]) -> Action | None:
        for segment in self.segments[stage]:
            micro_batch = self.forwarded[segment]
            if micro_batch == self.inputs_there[segment] or not self._has_row(micro_batch):
                continue
            row = self.row_of[micro_batch]
            if room(segment, row):
                self.forwarded[segment] += 1
                self.live[segment][row] += 1
                self.peak[segment] = max(self.peak[segment], sum(self.live[segment]))
                return Action(FORWARD, segment, micro_batch)
        return None

    def _has_row(self, micro_batch: int) -> bool:
        """Give the next micro-batch of segment 0 the first row that has micro-batches and memory
        left."""
        if micro_batch == len(self.row_of):
            free = (
                row
                for row, left in enumerate(self.remaining)
                if left and self._within_reach(0, row)
            )
            row = next(free, None)
            if row is None:
                return False
            self.remaining[row] -= 1
            self.row_of.append(row)
        return True

    def _within_reach(self, segment: int, row: int) -> bool:
        """Is less alive of this row than one micro-batch for each stage up to its furthest loss?"""
        routes = self.mix[row][0]
        if not routes.passes[segment]:  # only passing through: passes that are ready go first
            return not self.ready[self.stage_of[segment]]
        furthest = segment + routes.reach[segment]
        return self.live[segment][row] <= max(1, self.split) * (
            self.stage_of[furthest] - self.stage_of[segment]
        )

    def _within_bound(self, segment: int, row: int) -> bool:
        return sum(self.live[segment]) < self.bound[segment]

    def _take_pass(self, stage: int, silent: bool) -> Action | None:
        """The most urgent pass; of those that send nothing only if `silent`."""
        ready, held_back, taken = self.ready[stage], [], None
        while taken is None and ready and ready[0][0] <= silent:
            entry = heapq.heappop(ready)
            if self._keeps_sums(entry[-1]):
                taken = entry[-1]
            else:
                held_back.append(entry)
        for entry in held_back:
            heapq.heappush(ready, entry)
        return self._booked(taken)

    def _take_deferred(self, stage: int) -> Action | None:
        taken = next(filter(self._keeps_sums, self.deferred[stage]), None)
        if taken is not None:
            self.deferred[stage].remove(taken)
        return self._booked(taken)

    def _booked(self, taken: Action | None) -> Action | None:
        if taken is not None:
            for key in self._adds_to(taken):
                self.sums[key].append(taken.micro_batch)
        return taken

    def _keeps_sums(self, action: Action) -> bool:
        required = self.required_sums
        return required is None or all(
            required[key][len(self.sums[key])] == action.micro_batch
            for key in self._adds_to(action)
        )

    def _adds_to(self, action: Action) -> list[tuple[str, int]]:
        """The first pass of a micro-batch that reads the segment's own loss also runs its head."""
        segment, kind = action.segment, action.kind
        passes = self.mix[self.row_of[action.micro_batch]][0].passes[segment]
        deferred = (
            [("deferred", segment)]
            if passes[action.which].weights and kind != INPUT_GRADIENT
            else []
        )
        if kind == WEIGHT_GRADIENT:
            return deferred
        weights = [("weights", segment)] if passes[action.which].weights else []
        with_own_loss = [
            which
            for which, one in enumerate(passes)
            if any(loss == segment for loss, _ in one.reads)
        ]
        return (
            deferred
            + weights
            + ([("head", segment)] if with_own_loss[:1] == [action.which] else [])
        )

    def _finish(self, action: Action) -> None:
        """Book the end of `action`."""
        kind, segment, micro_batch = action[:3]
        row = self.row_of[micro_batch]
        passes = self.mix[row][0].passes[segment]
        if kind == FORWARD:
            self.passes_left[segment, micro_batch] = len(passes)
            self.live[segment][row] -= not passes
            for which, one in enumerate(passes):
                first = Action.of_pass(one, segment, micro_batch, which, self.split > 0)[0]
                self._plan(first, [loss for loss, _ in one.reads if loss != segment])
        elif kind != WEIGHT_GRADIENT:
            self.passes_left[segment, micro_batch] -= 1
            self.live[segment][row] -= not self.passes_left[segment, micro_batch]
            self.deferred[self.stage_of[segment]].extend(
                Action.of_pass(passes[action.which], *action[1:4], self.split > 0)[1:]
            )

    def _target(self, action: Action) -> int:
        """The stage that gets the result of `action`; its own when nobody does."""
        if action.kind == FORWARD:
            return self.stage_of[min(action.segment + 1, len(self.stage_of) - 1)]
        return self.stage_of[action.segment - (self._sent(action) is not None)]

    def _sent(self, action: Action) -> int | None:
        if action.kind == WEIGHT_GRADIENT:
            return None
        return (
            self.mix[self.row_of[action.micro_batch]][0].passes[action.segment][action.which].sends
        )

    def _deliver(self, action: Action) -> None:
        """The result of `action` is where it is needed."""
        if action.kind == FORWARD:
            above = action.segment + 1
            if above < len(self.stage_of) and self.inputs_there[above] < self.num_micro_batches:
                self.inputs_there[above] += 1
            return
        loss = self._sent(action)
        if loss is not None:
            for reader in self.readers.pop((action.segment - 1, action.micro_batch, loss)):
                self.missing[reader] -= 1
                self._enlist(reader)

    def _plan(self, action: Action, losses_from_above: list[int]) -> None:
        self.missing[action] = len(losses_from_above)
        for loss in losses_from_above:
            self.readers[action.segment, action.micro_batch, loss].append(action)
        self._enlist(action)

    def _enlist(self, action: Action) -> None:
        if not self.missing[action]:
            passes = self.mix[self.row_of[action.micro_batch]][0].passes[action.segment]
            silent = passes[action.which].sends is None
            entry = (silent, action.micro_batch, -action.segment, action.which, action)
            heapq.heappush(self.ready[self.stage_of[action.segment]], entry)
