"""run.json: what ran, in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"


def run_facts(folder: Path) -> dict[str, Any]:
    """run.json of a folder, {} where there is none that can be read."""
    try:
        facts = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
