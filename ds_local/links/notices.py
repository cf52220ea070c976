"""Words between ranks off the step path: notices that every rank can read, and a mailbox for small
reports.

Nothing here makes a stage wait for another.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_STORE_SECONDS = 10.0  # longest wait for the store


def post_notice(name: str, text: str) -> None:
    """Leave a notice for all ranks; the first one under a name stays. Needs nobody's
    cooperation."""
    _within_reach(lambda: _store().compare_set(f"ds_local/{name}", "", text))


def change_notice(name: str, text: str) -> None:
    """Like `post_notice`, but the newest stays."""
    _within_reach(lambda: _store().set(f"ds_local/{name}", text))


def read_notice(name: str) -> str | None:
    """The notice under `name`, without waiting for one."""

    def read() -> str | None:
        store, key = _store(), f"ds_local/{name}"
        return store.get(key).decode() if store.check([key]) else None

    return _within_reach(read)


_lost: list[Any] = []  # the store that does not answer any more


def _within_reach(ask: Callable[[], Any]) -> Any:
    """What the store answers; None when it died with its host, or the way there is cut, which its
    own client never notices."""
    if not dist.is_initialized() or _store() in _lost:
        return None
    box: list[Any] = []

    def run() -> None:
        try:
            box.append(ask())
        except (RuntimeError, ValueError):
            box.append(None)

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(_STORE_SECONDS)
    if not box:
        _lost[:] = [_store()]
        return None
    return box[0]


def report_failure(reason: str) -> None:
    """Say why this rank ends; the first failure of a run is added to everybody's error messages."""
    post_notice("first_failure", reason)


def first_failure() -> str:
    reason = read_notice("first_failure")
    return "" if reason is None else f"; first failure reported: {reason}"


def _store() -> Any:
    """The key-value store that the process group was started with."""
    return dist.distributed_c10d._get_default_store()


class Mailbox:
    """Small reports from one rank to another, off the step path: the sender never waits, the reader
    only looks.

    Args:
        group: the two-rank group of writer and reader (gloo); None when they are the same rank.
        reader: global rank that reads.
        shape: of a report (float64).
    """

    _RING = 16

    def __init__(self, group: Any, reader: int, shape: tuple[int, ...]) -> None:
        self.sent = self.taken = 0
        self._group = group
        self._reader = reader
        self._shape = shape
        self._kept: deque[tuple[dist.Work | None, Tensor]] = deque()
        if group is not None and dist.get_rank() == reader:
            for _ in range(self._RING):
                self._post()

    def _post(self) -> None:
        # the last entry stays 0 until the whole message has landed: gloo cannot be asked whether a
        # receive is complete
        buffer = torch.zeros(math.prod(self._shape) + 1, dtype=torch.float64)
        self._kept.append((dist.irecv(buffer, group=self._group, group_src=self._writer()), buffer))

    def _writer(self) -> int:
        return 1 - dist.get_group_rank(self._group, self._reader)

    def write(self, report: Tensor) -> None:
        buffer = torch.cat([report.flatten(), torch.ones(1, dtype=torch.float64)])
        try:
            work = None if self._group is None else dist.isend(buffer, self._reader, self._group)
        except RuntimeError:
            return  # the reader has finished and left; if it died, those who need its work will say so
        if len(self._kept) >= self._RING and self._group is not None:
            self._kept.popleft()  # long gone: the reader is at most a few steps away
        self._kept.append((work, buffer))
        self.sent += 1

    def read(self, at_least: int = 0) -> list[Tensor]:
        """The reports that have come; waits until `at_least` have come in the mailbox's life."""
        reports = []
        while self._kept and (self.taken < at_least or self._kept[0][1][-1] != 0):
            work, buffer = self._kept.popleft()
            if work is not None:
                work.wait()
                self._post()
            self.taken += 1
            reports.append(buffer[:-1].view(self._shape))
        return reports
