"""Ranks agree: everybody's value on every rank, and a failure of one is a failure of all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from ds_local.errors import CheckpointError, DsLocalError

T = TypeVar("T")
_of_thread = threading.local()


@contextmanager
def over(group: Any) -> Iterator[None]:
    """Inside, this thread agrees over a process group of all ranks that is not the world's, so that
    other threads may agree meanwhile."""
    _of_thread.group = group
    try:
        yield
    finally:
        _of_thread.group = None


def gather(value: Any) -> list[Any]:
    """Everybody's value, on every rank. A collective call where ranks have met."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=getattr(_of_thread, "group", None))
    return values


def together(action: Callable[[], T]) -> T:
    """What `action` returns here, once it has ended on every rank. A collective call.

    Raises:
        What it raised here, if that is no error of ours; else what the first rank that failed
        raised, a CheckpointError where that is no error of ours.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    found = gather(None if failure is None else (_kind(failure), _words(failure)))
    if failure is not None and _kind(failure) is None:
        raise failure
    # what is no error of ours comes first: it ends the run, on all ranks
    failed = [(how[0] is not None, rank, *how) for rank, how in enumerate(found) if how is not None]
    if failed:
        _, rank, kind, words = min(failed, key=lambda one: one[:2])
        where = f"rank {rank}: " if len(failed) < len(found) else ""
        raise (kind or CheckpointError)(where + words) from failure
    return result


def _kind(error: Exception) -> type[DsLocalError] | None:
    return type(error) if isinstance(error, DsLocalError) else None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if _kind(error) is None else str(error)
