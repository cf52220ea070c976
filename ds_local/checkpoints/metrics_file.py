"""metrics.jsonl of a run folder: no row is lost that a saved step has, whatever ends the run.

One strict JSON object a line. A number that is not finite is written as null, and "nonfinite" says
what happened: for training the kind of event, else the figures it befell. A loss that the routes do
not ask for is null too, but there "has_loss" is false.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ds_local.checkpoints.run_fields import is_row
from ds_local.config import strict_json
from ds_local.outputs import write_whole

METRICS_FILE = "metrics.jsonl"


def perplexity(loss: float) -> float:
    """Of a loss in nats a token; of one that is far too large, a very large number."""
    return math.exp(min(loss, 700.0))


def of_full_model(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of every step the row of its highest segment: how many there are may change on the way.

    Args:
        rows: of one split.
    """
    found: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        before = found.setdefault(row["step"], row)
        if row["segment"] >= before["segment"]:
            found[row["step"]] = row
    return list(found.values())


def not_finite(rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Rows that tell of a step that was not finite."""
    told = ("nonfinite", "nonfinite_step")
    return [row for row in rows if all(row.get(name) is not None for name in told)]


class MetricsFile:
    """metrics.jsonl: one object a line.

    A full disk keeps nobody from training: rows that it does not take are kept and written with the
    next ones.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting: list[str] = []  # lines that are not in the file yet

    def write(self, rows: list[dict[str, Any]]) -> OSError | None:
        """Add rows. Returns what kept them out of the file, for now."""
        self._waiting += map(_line, rows)
        try:
            self._append()
        except OSError as error:
            return error
        return None

    def _append(self, to_disk: bool = False) -> None:
        with self.path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                text = "".join(self._waiting).encode()
                while text:
                    text = text[file.write(text) :]
                if to_disk:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)  # no half lines
                raise
        self._waiting.clear()

    def sync(self) -> None:
        """Have all rows on the disk. Raises OSError when it does not take them."""
        self._append(to_disk=True)

    def read(self) -> list[dict[str, Any]]:
        """All rows; damaged lines, those that no run has written, and a last one that a killed run
        left half-written, are left out."""
        return [row for row in map(_row, self._lines()) if row is not None]

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []

    @property
    def damaged_path(self) -> Path:
        return self.path.with_suffix(f".damaged{self.path.suffix}")

    def keep_until(self, step: int) -> tuple[float, int]:
        """Drop what a run wrote after the step it goes on from, and move damaged lines to
        `damaged_path`.

        Returns:
            (seconds that the run had trained by then, number of damaged lines).
        """
        lines = self._lines()
        rows = [(_row(line), line) for line in lines]
        damaged = [line for row, line in rows if row is None and line.strip()]
        kept = [(row, line) for row, line in rows if row is not None and row["step"] <= step]
        if damaged:
            with self.damaged_path.open("ab") as file:
                file.writelines(line.rstrip(b"\n") + b"\n" for line in damaged)
                file.flush()
                os.fsync(file.fileno())
        text = b"".join(_strict(row, line) for row, line in kept)
        if text != b"".join(lines):
            write_whole(self.path, text.decode())
        return max((float(row["seconds"]) for row, _ in kept), default=0.0), len(damaged)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line, None when it is damaged, or none of a run's."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8
        return None
    return _finite(row) if is_row(row) else None


def _strict(row: dict[str, Any], line: bytes) -> bytes:
    """A line as it was, but for numbers that an older file has and JSON has not."""
    return line.rstrip(b"\n") + b"\n" if json.loads(line) == row else _line(row).encode()


def _line(row: dict[str, Any]) -> str:
    """A row of the file."""
    return strict_json.dumps(_finite(row)) + "\n"


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row; whatever is null because it was not finite has a word about it."""
    bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    named = {"nonfinite": row.get("nonfinite") or ", ".join(bad)} if bad else {}
    return row | dict.fromkeys(bad) | named
