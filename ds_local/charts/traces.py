"""What happened when, as Chrome and Perfetto show it: a lane for each stage."""

from __future__ import annotations

from typing import Any


def lane(stage: int, replica: int = 0) -> dict[str, Any]:
    """The name of a stage's lane, among those of its replica."""
    place = {"pid": replica, "tid": stage}
    return {"name": "thread_name", "ph": "M", **place, "args": {"name": f"stage {stage}"}}


def span(
    name: str,
    stage: int,
    start: float,
    end: float,
    replica: int = 0,
    unit: float = 1e6,
    **more: Any,
) -> dict[str, Any]:
    """Something with a name in a stage's lane.

    Args:
        unit: microseconds in one of `start` and `end`.
        more: other keys.
    """
    place = {"pid": replica, "tid": stage}
    return {
        "name": name,
        "ph": "X",
        **place,
        "ts": start * unit,
        "dur": (end - start) * unit,
    } | more
