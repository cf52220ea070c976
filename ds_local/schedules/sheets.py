"""Schedules as files: the CSV of torch's pipelining, and the grid that `replay.grid_of` prints.

A row is a stage, a cell one action: "2I3" is the input gradient of segment 2 (a stage, in torch's
words) on micro-batch 3. F is a forward, B a backward, I and W its halves. Empty cells, transfers
and shards are skipped, since an action here receives what it needs and sends what it gives. Behind
a cell, where torch does not look, stand a "+" for each step that a forward runs ahead, and "/1" for
the pass where a segment hands several gradients through.

Which loss trains what is not in a file, so one is read against the schedule of the same rows.

Pure Python: no torch, no DeepSpeed.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from ds_local.errors import ScheduleError
from ds_local.schedules.cells import Cell, cell_of, halves_of, handing_on, read_cell
from ds_local.schedules.replay import Program, expected_actions, validate
from ds_local.schedules.schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Schedule,
    successive,
)

_LANE = re.compile(r"stage (\d+) +(.*)")
_WIDE = 24  # cells of a row that a message shows


# --- writing ------------------------------------------------------------------------------------


def csv_of(schedule: Schedule) -> str:
    """The text of a CSV file."""
    text = io.StringIO()
    halves = halves_of(schedule)
    rows = [[cell_of(schedule, one, halves) for one in stage] for stage in schedule.stages]
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


# --- reading ------------------------------------------------------------------------------------


def placement_in(path: str | Path, num_stages: int, num_segments: int) -> tuple[int, ...]:
    """Segment -> stage, as a file deals them.

    Raises:
        ScheduleError: when it cannot be read, or deals them unevenly.
    """
    sheet = _Sheet(path, num_stages)
    found: dict[int, Cell] = {}
    for cell in sheet.cells:
        other = found.setdefault(cell.segment, cell)
        if other.stage != cell.stage:
            sheet.refuse(f"segment {cell.segment} is on stage {other.stage} too", cell)
    per_stage = num_segments // num_stages
    held = [sorted(s for s, c in found.items() if c.stage == n) for n in range(num_stages)]
    even = all(len(segments) == per_stage for segments in held)
    if sorted(found) != list(range(num_segments)) or not even:
        sheet.refuse(
            f"stages hold the segments {held}, but {num_stages} stages of {per_stage} are asked "
            f"for; set num_stages and segments_per_stage to what the file has"
        )
    if 0 not in held[0]:
        sheet.refuse(f"segment 0 is on stage {found[0].stage}; the data comes to stage 0")
    return tuple(found[segment].stage for segment in range(num_segments))


def read_schedule(path: str | Path, own: Schedule, link_depth: int) -> Schedule:
    """The schedule in a file, proven to be complete and free of deadlocks.

    Args:
        path: torch's CSV (.csv), else the text of a grid.
        own: of the same rows of micro-batches and number of stages.
        link_depth: messages a link between stages holds before its sender has to wait.

    Raises:
        ScheduleError: with a sentence, the file's grid and the place.
    """
    sheet = _Sheet(path, own.num_stages)
    stage_of = placement_in(path, own.num_stages, len(own.stage_of))
    if own.leads and (stage_of != own.stage_of or not sheet.is_csv):
        sheet.refuse(
            "where forwards run ahead, a schedule is read from a CSV alone, with segments dealt "
            "to stages in order"
        )
    split = {(c.segment, c.micro_batch) for c in sheet.cells if c.kind == WEIGHT_GRADIENT}
    stages: list[list[Action]] = [[] for _ in own.stages]
    cells: dict[Action, Cell] = {}
    for cell in sheet.cells:
        for action in sheet.actions_of(cell, own, split):
            if action in cells:
                sheet.refuse("it is there twice", cells[action], cell)
            cells[action] = cell
            stages[cell.stage].append(action)
    found = replace(own, stages=tuple(map(tuple, stages)), stage_of=stage_of)
    missing = sorted(expected_actions(found) - cells.keys())
    if missing:
        names = ", ".join(cell_of(found, action, split) for action in missing[:5])
        sheet.refuse(f"{len(missing)} actions are missing: {names}")
    program = Program(successive([found]))
    if program.stuck is not None:
        blocked = [cells[action] for action in program.blocked if action in cells]
        sheet.refuse(f"an action comes before what it needs, {program.stuck}", *blocked)
    validate(found, link_depth)
    return found


@dataclass
class _Sheet:
    """The cells of a file, row by row."""

    path: str | Path
    num_stages: int

    def __post_init__(self) -> None:
        self.is_csv = Path(self.path).suffix.lower() == ".csv"
        try:
            text = Path(self.path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ScheduleError(f"cannot read the schedule {self.path}: {error}") from error
        rows = self._rows_of_csv(text) if self.is_csv else self._rows_of_grid(text)
        if len(rows) != self.num_stages:
            raise ScheduleError(
                f"{self.path} has {len(rows)} rows with actions, but there are {self.num_stages} "
                "stages; a row is a stage"
            )
        self.cells = [cell for stage, row in enumerate(rows) for cell in self._parsed(stage, row)]

    @staticmethod
    def _rows_of_csv(text: str) -> list[list[str]]:
        rows = list(csv.reader(io.StringIO(text)))
        return [row for row in rows if row]

    @staticmethod
    def _rows_of_grid(text: str) -> list[list[str]]:
        lanes = filter(None, map(_LANE.fullmatch, map(str.rstrip, text.splitlines())))
        return [lane[2].split() for lane in lanes]

    def _parsed(self, stage: int, row: Sequence[str]) -> Iterator[Cell]:
        for number, written in enumerate(row, 1):
            try:
                yield from read_cell(written, stage, with_segment=self.is_csv)
            except ValueError as error:
                raise ScheduleError(
                    f"{self.path}: stage {stage}, cell {number}: {error}; write segment, kind (F, "
                    "B, I or W) and micro-batch, as in 2F0"
                ) from None

    def actions_of(
        self, cell: Cell, own: Schedule, split: Collection[tuple[int, int]]
    ) -> list[Action]:
        """What a cell stands for; nothing for a first half that has nothing to send."""
        _, _, segment, kind, micro_batch, ahead, which = cell
        count = own.num_micro_batches
        if micro_batch >= count:
            self.refuse(f"micro-batches are numbered from 0 to {count - 1}", cell)
        passes = own.rows[micro_batch].passes[segment]
        if kind == FORWARD:
            return [Action(FORWARD, segment, micro_batch, ahead=ahead)]
        training = next((n for n, one in enumerate(passes) if one.weights), None)
        handing = handing_on(passes, (segment, micro_batch) in split)
        if kind == INPUT_GRADIENT and which in (None, *handing) and handing:
            first = handing[0] if which is None else which
            return [Action(INPUT_GRADIENT, segment, micro_batch, first)]
        if training is None or which is not None:
            self.refuse("the table of losses has no such pass", cell)
        if kind == INPUT_GRADIENT and (segment, micro_batch) in split:
            return []
        if kind == INPUT_GRADIENT:
            half = f"its other half, {segment}W{micro_batch}, is missing"
            sends = passes[training].sends is not None
            self.refuse(half if sends else f"segment {segment} sends no gradient down", cell)
        if passes[training].sends is None:
            kind = BACKWARD  # with nothing to send, the other half is all of it
        return [Action(kind, segment, micro_batch, training)]

    def refuse(self, why: str, *at: Cell) -> NoReturn:
        """Say what is wrong, with the grid and the places in brackets."""
        place = f": stage {at[0].stage}, {at[0].text}" if at else ""
        raise ScheduleError(f"{self.path}{place}: {why}\n{self._grid(at)}")

    def _grid(self, at: Sequence[Cell]) -> str:
        rows: dict[int, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            rows[cell.stage].append(cell)
        first = max(0, min((rows[c.stage].index(c) for c in at), default=0) - _WIDE // 2)
        lines = []
        for stage in range(self.num_stages):
            shown = [f"[{c.text}]" if c in at else c.text for c in rows[stage][first:][:_WIDE]]
            more = len(rows[stage]) > first + _WIDE
            lines.append(f"stage {stage}  {'... ' * (first > 0)}{' '.join(shown)}{' ...' * more}")
        return "\n".join(lines)
