"""How an action is written in grids and files: "2I3" is the input gradient of segment 2 on
micro-batch 3."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ds_local.schedules.routes import Pass
from ds_local.schedules.schedule import INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Schedule

Halves = Collection[tuple[int, int]]  # (segment, micro-batch) of the backwards that are split


def halves_of(schedule: Schedule) -> Halves:
    return {action[1:3] for action in schedule.actions() if action.kind == WEIGHT_GRADIENT}


def cell_of(schedule: Schedule, action: Action, halves: Halves, segment: bool = True) -> str:
    """An action as it is written, "+" for each step that it is ahead, "/1" for the pass where a
    segment hands several gradients through.

    Args:
        segment: write the segment too.
    """
    name = f"{action.segment if segment else ''}{action}"
    if action.kind == INPUT_GRADIENT:
        passes = schedule.rows[action.micro_batch].passes[action.segment]
        if action.which != handing_on(passes, action[1:3] in halves)[0]:
            name += f"/{action.which}"
    return name


def handing_on(passes: Sequence[Pass], split: bool) -> list[int]:
    """The passes that an I may stand for: those that only send, the first half of a split one."""
    return [
        which
        for which, one in enumerate(passes)
        if one.sends is not None and (split or not one.weights)
    ]
