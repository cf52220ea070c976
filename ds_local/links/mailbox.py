"""A mailbox of rank 0 for small reports, off the step path."""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_local.links.groups import HostGroup

_READER = 0  # global rank


class Mailbox:
    """Small reports from a rank to rank 0, off the step path: the sender never waits, the reader
    only looks.

    Args:
        group: of writer and reader; None when they are the same rank.
        shape: of a report (float64).
        timeout_seconds: longest wait of a reader that asks for more than has come.
    """

    _RING = 16

    def __init__(
        self,
        group: HostGroup | None,
        shape: tuple[int, ...],
        timeout_seconds: float = 300.0,
    ) -> None:
        self.sent = self.taken = 0
        self._limit = timedelta(seconds=timeout_seconds)
        self._group = group
        self._tag = 0 if group is None else group.take_tags()
        self._shape = shape
        self._kept: deque[tuple[dist.Work | None, Tensor]] = deque()
        if group is not None and dist.get_rank() == _READER:
            for _ in range(self._RING):
                self._post()

    def _post(self) -> None:
        # the last entry stays 0 until the whole message has landed: gloo cannot be asked whether a
        # receive is complete
        buffer = torch.zeros(math.prod(self._shape) + 1, dtype=torch.float64)
        assert self._group is not None, "within a rank nothing is received"
        (writer,) = self._group.places.keys() - {_READER}
        self._kept.append((self._group.receive(buffer, writer, self._tag), buffer))

    def write(self, report: Tensor) -> None:
        buffer = torch.cat([report.flatten(), torch.ones(1, dtype=torch.float64)])
        try:
            work = None
            if self._group is not None:
                work = self._group.send(buffer, _READER, self._tag)
        except RuntimeError:
            # the reader has finished and left; if it died, those who need its work will say so
            return
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
                work.wait(self._limit)
                with suppress(RuntimeError):  # the writer has left; others say why
                    self._post()
            self.taken += 1
            reports.append(buffer[:-1].view(self._shape))
        return reports
