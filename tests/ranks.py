"""Ranks that live as long as the test session."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from ds_local.cluster.surroundings import free_port
from ds_local.measure.ranks import Pool, RankError

__all__ = ["RankError", "close_ranks", "free_port", "run_ranks"]

_pool = Pool(preload=["warm_ranks"])


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any
) -> list[Any]:
    """What a module-level function returned on each of `world_size` ranks."""
    if os.environ["DS_ACCELERATOR"] == "cpu":
        _start_server()
    return _pool.run(function, world_size, *args, **kwargs)


@functools.cache
def _start_server() -> None:
    """The process that ranks are forked from finds modules where its environment says."""
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=":".join(places)):
        forkserver.ensure_running()


def close_ranks() -> None:
    _pool.close()
