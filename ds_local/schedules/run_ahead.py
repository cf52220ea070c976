"""Forwards that run ahead of the update: no stage waits for gradients to come back.

The *lead* of a segment is how many forwards it is ahead of the micro-batch whose gradient it waits
for: one for each segment up to its furthest loss, and more where links are slow. Counted from the
start of a stretch of steps, forward number n of a segment with lead a uses the weights after
`max(0, n - a) // M` updates, M micro-batches to a step. Its backward uses the same weights, and its
gradient goes into the update of its own step. So every update takes its own step's micro-batches,
each once, and only the weights they were computed with are older: on average by a / M updates.

The lead depends on the segments alone, so the same weights are used however segments are dealt to
stages. The order of a stage is fixed: for each micro-batch first the gradients that can go at once,
then the forward that is as far ahead, then the other passes, those that send first. That is 1F1B
which never flushes (PipeDream's order, Narayanan et al. 2019,
with its stashed weights; the gradients of a step accumulate as in PipeDream-2BW, Narayanan et al.
2021), in 1F1B's memory but for the copies of weights.

Pure Python: no torch, no DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ds_local.schedules.list_scheduler import Mix, deal
from ds_local.schedules.routes import Pass
from ds_local.schedules.schedule import FORWARD, Action, Schedule, successive

_WORK = 3  # of a micro-batch on a segment, in forwards


def leads_of(mix: Mix, limit: int | None = None, transfer: float = 0.0) -> tuple[int, ...]:
    """The lead of each segment. It never rises from a segment to the next: between two steps all
    stages may stop, to save or to evaluate, and none must wait then for what the one below sends
    only after it.

    So below a chunk the leads go on from what the chunk has. Its last segment is as far ahead as
    the one above it, although it waits for nothing, and goes backward that much later; the segment
    below it may therefore be one forward closer to it than inside the uppermost chunk.

    Args:
        mix: the rows of a step's micro-batches.
        limit: the most that is wanted; None: as much as leaves no stage waiting.
        transfer: time from one stage to the next, in forwards, there and back for each segment
            between; it counts in whole micro-batches, since the order of a stage is fixed.
    """
    each, leads = math.ceil(1 + 2 * transfer / _WORK - 1e-9), [0]
    below = 0  # what is added below a chunk
    for segment in reversed(range(mix[0][0].num_segments)):
        reach = max((rows.reach[segment] for rows, _ in mix if rows.passes[segment]), default=0)
        own = reach * each
        if own + below < leads[0]:
            below = leads[0] - own - 1
        leads.insert(0, max(leads[0], own + below))
    return tuple(lead if limit is None else min(lead, limit) for lead in leads[:-1])


def make_run_ahead(
    mix: Mix, num_stages: int, limit: int | None = None, transfer: float = 0.0
) -> Schedule:
    """The schedule of a step in the middle of a run; `Schedule.at` gives those at its ends.

    Args:
        mix: the rows of the step's micro-batches, in their order.
        num_stages: the segments are dealt to the stages in order, evenly.
        limit, transfer: see `leads_of`.

    Raises:
        ScheduleError: when the segments cannot be dealt evenly.
    """
    mix, name, stage_of = deal(mix, num_stages)
    rows = tuple(routes for routes, count in mix for _ in range(count))
    leads = leads_of(mix, limit, transfer)
    plain = Schedule(f"{name}, run ahead", (), stage_of, rows, leads)
    within = leads_of(mix, None, transfer)
    held = [[s for s, at in enumerate(stage_of) if at == stage] for stage in range(num_stages)]
    return replace(
        plain,
        stages=tuple(tuple(_order(plain, within, segments)) for segments in held),
        opening=tuple(
            tuple(
                _forward(plain, segment, position)
                for segment in segments
                for position in range(leads[segment])
            )
            for segments in held
        ),
    )


def _order(plain: Schedule, within: Sequence[int], segments: Sequence[int]) -> Iterator[Action]:
    """What a stage with these segments does in a step, in the middle of a run.

    Args:
        within: of each segment, how many forwards it is ahead inside a step.
    """
    count, ahead = plain.num_micro_batches, plain.leads
    for micro_batch, routes in enumerate(plain.rows):
        passes = [
            (segment, which, one)
            for segment in reversed(segments)
            for which, one in enumerate(routes.passes[segment])
        ]
        at_once = [
            (segment, which, one)
            for segment, which, one in passes
            if _needs_own_loss_alone(one, segment)
            and (micro_batch < ahead[segment] or (micro_batch and within[segment]))
        ]
        yield from _actions(at_once, micro_batch)
        for segment in segments:
            first = ahead[segment] if not micro_batch else micro_batch + within[segment]
            last = min(micro_batch + within[segment], count + ahead[segment] - 1)
            for position in range(first, last + 1):
                yield _forward(plain, segment, position)
        others = [entry for entry in passes if entry not in at_once]
        yield from _actions([entry for entry in others if entry[2].sends is not None], micro_batch)
        yield from _actions([entry for entry in others if entry[2].sends is None], micro_batch)


def _needs_own_loss_alone(one: Pass, segment: int) -> bool:
    return one.sends is not None and all(loss == segment for loss, _ in one.reads)


def _actions(passes: Sequence[tuple[int, int, Pass]], micro_batch: int) -> Iterator[Action]:
    for segment, which, one in passes:
        yield from Action.of_pass(one, segment, micro_batch, which, split=False)


def _forward(plain: Schedule, segment: int, position: int) -> Action:
    ahead, micro_batch = divmod(position, plain.num_micro_batches)
    return Action(FORWARD, segment, micro_batch, ahead=ahead)


def weights_of(lead: int, position: int, num_micro_batches: int) -> int:
    """The updates that forward number `position` of a segment has seen, both counted from the start
    of a stretch."""
    return max(0, (position - lead) // num_micro_batches)


def copies_of(schedule: Schedule) -> list[int]:
    """Of each segment the most earlier weights that its micro-batches need at once."""
    count = schedule.num_micro_batches
    most = [0] * len(schedule.stage_of)
    needed: list[dict[tuple[int, int], int]] = [{} for _ in most]  # micro-batch -> its weights
    run = successive([schedule] * (2 * schedule.steps_ahead + 1)) if schedule.leads else []
    for step, windows in enumerate(run):
        for action in windows.actions():
            segment, of_step = action.segment, step + action.ahead
            key = of_step, action.micro_batch
            if action in windows.last_use:
                needed[segment].pop(key, None)
            elif action.kind == FORWARD:
                position = of_step * count + action.micro_batch
                version = weights_of(schedule.leads[segment], position, count)
                if version < of_step:
                    needed[segment][key] = version
            most[segment] = max(most[segment], len(set(needed[segment].values())))
    return most
