"""How an action is written in grids and files, by us and by torch: "2I3" is the input gradient of
segment 2 on micro-batch 3."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from ds_local.schedules.routes import Pass
from ds_local.schedules.schedule import INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Schedule

_ACTION = re.compile(r"(\d*)([FBIW])(\d+)(\+*)(?:/(\d+))?")
_SKIPPED = re.compile(r"[.']?|\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_TOGETHER = re.compile(r"\((.*)\)OVERLAP_F_B")  # a forward and a backward that torch overlaps
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


class Cell(NamedTuple):
    """An action as it is written."""

    stage: int
    text: str
    segment: int
    kind: str
    micro_batch: int
    ahead: int
    which: int | None


def read_cell(cell: str, stage: int, with_segment: bool = True) -> Iterator[Cell]:
    """The actions in a cell of a stage's row: none where it is empty, a transfer or a shard.

    Args:
        with_segment: every action is written with its segment, else that may be left out.

    Raises:
        ValueError: when it is something else.
    """
    whole = cell.strip()
    together = _TOGETHER.fullmatch(whole)
    for text in map(str.strip, together[1].split(";") if together else [whole]):
        if _SKIPPED.fullmatch(text):
            continue
        match = _ACTION.fullmatch(text)
        if match is None or (with_segment and not match[1]):
            raise ValueError(f"{whole!r} is no action")
        segment, kind, micro_batch, ahead, which = match.groups()
        yield Cell(
            stage,
            text,
            int(segment or stage),
            kind,
            int(micro_batch),
            len(ahead),
            int(which) if which else None,
        )
