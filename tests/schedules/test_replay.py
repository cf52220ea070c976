"""What is missing, double, misplaced or stuck is found and named."""

import pytest
from schedule_rows import schedule_of

from ds_local.errors import ScheduleError
from ds_local.schedules.replay import validate
from ds_local.schedules.schedule import (
    Schedule,
)


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
