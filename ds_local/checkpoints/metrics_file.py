"""metrics.jsonl of a run folder.

One strict JSON object a line. A number that is not finite is written as null, and "nonfinite" says
what happened: for training the kind of event, else the figures it befell. A loss that the routes do
not ask for is null too, but there "has_loss" is false.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ds_local.config import strict_json


class MetricsFile:
    """metrics.jsonl: one object a line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.writelines(map(_line, rows))

    def read(self) -> list[dict[str, Any]]:
        """All rows; a last line that a killed run left half-written is dropped."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def keep_until(self, step: int) -> float:
        """Drop what a run wrote after the step it resumes from; returns the seconds it had trained
        by then."""
        rows = [row for row in self.read() if row["step"] <= step]
        self.path.write_text("".join(map(_line, rows)))
        return max((row["seconds"] for row in rows), default=0.0)


def _line(row: dict[str, Any]) -> str:
    """A row of the file; whatever is null because it was not finite has a word about it."""
    bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    named = {"nonfinite": row.get("nonfinite") or ", ".join(bad)} if bad else {}
    return strict_json.dumps(row | named) + "\n"
