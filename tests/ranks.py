"""Ranks that live as long as the test session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_local.cluster.surroundings import free_port
from ds_local.measure.ranks import Pool, RankError

__all__ = ["RankError", "close_ranks", "free_port", "run_ranks"]

_pool = Pool(preload=["warm_ranks"])


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any
) -> list[Any]:
    """What a module-level function returned on each of `world_size` ranks."""
    return _pool.run(function, world_size, *args, **kwargs)


def close_ranks() -> None:
    _pool.close()
