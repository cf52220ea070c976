"""Schedules in model time; what is missing, double, misplaced or stuck is found and named."""

import random
from dataclasses import replace
from itertools import product

import pytest
from schedule_rows import schedule_of

from ds_local.errors import ScheduleError
from ds_local.schedules.replay import Program, grid_of, replay, validate
from ds_local.schedules.schedule import FORWARD, Schedule


def test_validate_finds_what_is_missing_double_or_misplaced():
    good = schedule_of(("local", None, 2), stages=2)
    missing = Schedule(good.name, (good.stages[0][:-1], good.stages[1]), good.stage_of, good.rows)
    double = Schedule(
        good.name, (good.stages[0], (*good.stages[1], good.stages[1][0])), good.stage_of, good.rows
    )
    misplaced = Schedule(good.name, (good.stages[0] + good.stages[1], ()), good.stage_of, good.rows)
    for bad in (missing, double):
        with pytest.raises(ScheduleError, match="missing, unknown or double"):
            validate(bad, 4)
    with pytest.raises(ScheduleError, match="not on its own"):
        validate(misplaced, 4)


def test_validate_finds_a_deadlock():
    good = schedule_of(("backprop", None, 2), stages=2)
    first_gradients = Schedule(
        good.name, (good.stages[0][::-1], good.stages[1]), good.stage_of, good.rows
    )
    with pytest.raises(ScheduleError, match="deadlock: stage 0 waits for the inputs of"):
        validate(first_gradients, 4)


def test_a_link_that_is_too_short_is_named_with_the_remedy():
    with pytest.raises(ScheduleError, match=r"links hold 1 messages, raise link.depth"):
        validate(schedule_of(("backprop", None, 2), ("local", None, 6), stages=4), 1)


def test_the_grid_of_two_stages_by_hand():
    grid = grid_of(schedule_of(("backprop", None, 2), stages=2))
    assert grid.splitlines() == [
        "backprop: 2 stages, 2 micro-batches, 9 ticks, idle 33%",
        "stage 0  F0 F1 .  .  B0 '  .  B1 '",
        "stage 1  .  F0 B0 '  F1 B1 '  .  .",
    ]


def test_every_action_starts_as_early_as_its_inputs_allow():
    """Hand-worked: a message takes half a unit, stage 1 computes twice as long."""
    schedule = schedule_of(("local", None, 2), stages=2)
    events, stuck = replay(
        schedule,
        cost=lambda schedule, action: 1.0 + action.segment,
        link_time=lambda link: 0.5,
    )
    assert stuck is None
    spans = {(e.stage, str(e.action)): (e.start, e.end) for e in events}
    assert spans == {
        (0, "F0"): (0, 1),
        (0, "B0"): (1, 2),
        (0, "F1"): (2, 3),
        (0, "B1"): (3, 4),
        (1, "F0"): (1.5, 3.5),
        (1, "B0"): (3.5, 5.5),
        (1, "F1"): (5.5, 7.5),
        (1, "B1"): (7.5, 9.5),
    }


def test_a_full_link_holds_its_sender_back():
    schedule = schedule_of(("local", None, 4), stages=2)

    def forwards_of_stage_0(depth):
        events, _ = replay(schedule, lambda s, a: 1.0 + 9 * a.segment, link_depth=depth)
        return [e.start for e in events if e.stage == 0 and e.action.kind == FORWARD]

    assert forwards_of_stage_0(None) == [0, 2, 4, 6]
    # stage 1 takes messages at 1, 21, 41: the third result waits for the second to be taken, and
    # all that stage 0 does next waits with it
    assert forwards_of_stage_0(1) == [0, 2, 4, 22]


def test_steps_follow_each_other_without_a_wait():
    schedule = schedule_of(("local", None, 1), stages=2)
    events, _ = replay(schedule, steps=2)
    assert [(e.step, e.start) for e in events if e.stage == 0] == [(0, 0), (0, 1), (1, 3), (1, 4)]


def test_a_step_that_ends_alone_ends_after_any_others():
    """What `validate` relies on where nothing runs ahead: it looks at one step."""
    ended = {True: 0, False: 0}
    for stages, count, seed in product((2, 3, 4), (1, 3, 6), range(6)):
        mode = ("backprop", "local", "overlapping", "interlocking")[seed % 4]
        schedule = schedule_of((mode, None, count), stages=stages)
        if seed > 2:  # other orders, many of which get stuck
            draw = random.Random(seed)
            order = [draw.sample(stage, len(stage)) for stage in schedule.stages]
            kinds = [sorted(stage, key=lambda a: a.kind != FORWARD) for stage in order]
            schedule = replace(schedule, stages=tuple(map(tuple, kinds)))
        for depth in (1, 2, 4):
            alone, several = (Program([schedule] * steps, depth).stuck for steps in (1, 5))
            assert (alone is None) == (several is None)
            ended[alone is None] += 1
    assert min(ended.values()) > 20
