"""What this process's main thread does at this moment, for whoever asks."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ds_local.links.waiting import EVERYBODY, WAITING

_COLLECTIVES = str(Path("torch", "distributed"))


class Wait(NamedTuple):
    """A wait for another rank."""

    rank: int  # that is waited for, EVERYBODY or OUTSIDE
    purpose: str
    seconds: float

    def sentence(self, who: str, name: Callable[[int], str]) -> str:
        whom = "all " if self.rank == EVERYBODY else f"{name(self.rank)} " if self.rank >= 0 else ""
        return f"{who} has waited {self.seconds:.0f} s for {whom}{self.purpose}"


class Observer:
    """Looks at the thread that makes it."""

    def __init__(self) -> None:
        self.doing, self.since = "its start", time.perf_counter()
        self._main = threading.get_ident()
        self._collective: tuple[int, float] | None = None  # its frame, and when it was seen first

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """The main thread is in this."""
        before = self.doing, self.since
        self.doing, self.since = what, time.perf_counter()
        try:
            yield
        finally:
            self.doing, self.since = before

    def state(self, _: Any = None) -> dict[str, Any]:
        """{"doing", "seconds": for so long, "at": where in the code, "waiting": a `Wait` or None}.

        A rank waits when it is in a `Waiter`, or in a function of torch.distributed.
        """
        frame: Any = sys._current_frames().get(self._main)
        collective = None
        while frame is not None and _COLLECTIVES in frame.f_code.co_filename:
            collective, frame = frame, frame.f_back
        at = "its end"
        if frame is not None:
            code = frame.f_code
            at = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        now = time.perf_counter()
        return {
            "doing": self.doing,
            "seconds": now - self.since,
            "at": at,
            "waiting": self._wait(collective, now),
        }

    def _wait(self, collective: Any, now: float) -> Wait | None:
        before, self._collective = self._collective, None
        if WAITING:
            since, rank, purpose = WAITING[0]
            return Wait(rank, purpose, now - since)
        if collective is None:
            return None
        same = before is not None and before[0] == id(collective)
        self._collective = before if same and before else (id(collective), now)
        return Wait(EVERYBODY, f"in {self.doing}", now - self._collective[1])
