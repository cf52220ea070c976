"""run.json: what ran, in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"

_OBJECTS = ("arguments", "config", "model", "data", "layout", "machine", "versions", "gathered")
_LISTS = ("routes", "schedules", "starts")


def run_facts(folder: Path) -> dict[str, Any]:
    """run.json of a folder, {} where there is none that can be read, or none of a run."""
    try:
        facts = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if _is_of_a_run(facts) else {}


def _is_of_a_run(facts: Any) -> bool:
    """Are the parts that it has of their kinds?"""
    if not isinstance(facts, dict):
        return False
    objects = all(isinstance(facts.get(key, {}), dict) for key in _OBJECTS)
    lists = all(isinstance(facts.get(key, []), list) for key in _LISTS)
    return (
        objects
        and lists
        and all(type(facts.get("layout", {}).get(key, 1)) is int for key in ("stages", "replicas"))
        and all(isinstance(start, dict) for start in facts.get("starts", []))
    )
