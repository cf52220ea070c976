"""Waiting for another rank: never without a limit, and never unseen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

from torch import distributed as dist

from ds_local.errors import LostConnection

# what gloo and NCCL say when the other end, or the way there, is gone or silent
_BROKEN = (
    "gloo/",
    "caused pair closure",
    "ncclRemoteError",
    "remote process exited",
    "collective operation timeout",
    "communicator was aborted",
)
_OF_THE_PROGRAM = ("CUDA error", "Cuda failure", "enforce fail")  # said by these, yet no lost peer
_LATE = ("imed out", "imeout")

EVERYBODY = -1  # stands for a rank
OUTSIDE = -2  # stands for another job; the purpose names it


class Waiting(NamedTuple):
    """What a rank waits for at this moment."""

    since: float  # by `time.perf_counter`
    rank: int  # that is waited for, or EVERYBODY
    purpose: str


WAITING: list[Waiting] = []  # of this process, the longest first


@contextmanager
def waiting(rank: int, purpose: str) -> Iterator[None]:
    """Inside, this process waits, and whoever asks is told so."""
    now = Waiting(time.perf_counter(), rank, purpose)
    WAITING.append(now)
    try:
        yield
    finally:
        WAITING.remove(now)


def is_lost(error: BaseException) -> bool:
    """Is this an error of the way to another rank, and not of what is computed here?"""
    if isinstance(error, LostConnection | dist.DistStoreError | dist.DistNetworkError):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and any(word in text for word in _BROKEN)
        and not any(word in text for word in _OF_THE_PROGRAM)
    )


def is_late(error: BaseException) -> bool:
    """Of a lost connection: did a wait go beyond its limit?"""
    if isinstance(error, LostConnection):
        return error.late
    return any(word in str(error) for word in _LATE)


class Waiter:
    """Waits for other ranks and keeps the books.

    Args:
        timeout_seconds: longest wait.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.waited = 0.0  # seconds in all

    def wait_for(self, work: Any, rank: int, who: str, purpose: str) -> None:
        """Wait until `work` is done.

        Args:
            rank, who: of the other end; its number and its name.
            purpose: what it is to do, as in "to send step 3".

        Raises:
            LostConnection: when the other end is gone, or nothing came within the limit. Other
                errors, of a device say, pass.
        """
        started = time.perf_counter()
        try:
            with waiting(rank, purpose):
                work.wait(timedelta(seconds=self.timeout_seconds))
        except (RuntimeError, TimeoutError) as error:
            late = isinstance(error, TimeoutError) or is_late(error)
            if not isinstance(error, TimeoutError) and not is_lost(error):
                raise
            waited = time.perf_counter() - started
            cause = f"nothing came within {waited:.0f} s" if late else "the connection is gone"
            raise LostConnection(f"waited for {who} {purpose}, but {cause}", late) from error
        finally:
            self.waited += time.perf_counter() - started
