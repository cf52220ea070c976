"""Rows of a task, and which of earlier calls stand, so that `benchmark.py gpu` goes on where it
was."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ds_local.errors import first_line
from ds_local.measure.gpu_checks import RUN, missing_methods

Row = dict[str, Any]


_SAID = ("tokens_per_second", "useful_mfu", "forward", "head", "seconds", "efficiency")


def rows_of(task: str, run: Callable[[], Iterable[Row]], args: argparse.Namespace) -> list[Row]:
    """What a task measures, as far as the device's memory goes."""
    rows: list[Row] = []
    try:
        for row in run():
            rows.append({"task": task, "dry_run": args.dry_run, **row})
            said = ", ".join(f"{k} {row[k]:.3g}" for k in _SAID if isinstance(row.get(k), float))
            print(f"{task}, {row['what']}: {said}", file=sys.stderr, flush=True)
    except torch.OutOfMemoryError as error:
        print(f"{task} does not fit: {first_line(error)}", file=sys.stderr, flush=True)
    return rows


def is_done(task: str, rows: Sequence[Row], args: argparse.Namespace) -> bool:
    """Whether the task needs no other run: tests have all passed, a study has all its methods,
    anything else has a row. A dry run stands for no real one, nor the other way round."""
    own = _of(task, rows, args)
    if task == "tests":
        return any(map(_passed, own))
    if task == "study":
        return not missing_methods(own, args)
    return bool(own)


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows, without those that newer ones replace."""
    newer = set(map(_key, new))
    return [*(row for row in rows if _key(row) not in newer), *new]


def has_failed_tests(rows: Sequence[Row], args: argparse.Namespace) -> bool:
    """Whether tests that this call asks for have failed, or could not begin."""
    return "tests" in args.parts and not all(map(_passed, _of("tests", rows, args)))


def _of(task: str, rows: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    return [row for row in rows if row["task"] == task and _is_dry(row) == args.dry_run]


def _is_dry(row: Row) -> bool:
    """Older rows do not say it, but their command does."""
    return row.get("dry_run", "--dry-run" in row.get("command", "").split())


def _passed(row: Row) -> bool:
    return row["passed"] > 0 and not row["failed"] and not row.get("exit_code")


def _key(row: Row) -> Any:
    """Equal for rows of which the newer one counts."""
    if row["task"] == "tests":
        return "tests", _is_dry(row)
    if row["task"] == "study":
        return "study", row["preset"], *(row.get(name) for name in RUN)
    return id(row)
