"""metrics.jsonl of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """metrics.jsonl: one object a line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

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
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return max((row["seconds"] for row in rows), default=0.0)
