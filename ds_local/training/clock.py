"""Seconds of training: validations, saves, reports and the first step of a start do not count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Stands until the first `start`.

    Args:
        seconds: that earlier starts of the run have trained.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._earlier, self._depth = seconds, 0
        self._began: float | None = None
        self._paused_at = 0.0  # when the outermost pause began

    def start(self) -> None:
        """The first step, which pays for the start, is done; later calls change nothing."""
        self._began = time.perf_counter() if self._began is None else self._began

    @property
    def seconds(self) -> float:
        now = self._paused_at if self._depth else time.perf_counter()
        own = 0.0 if self._began is None else now - self._began
        return round(self._earlier + own, 3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count."""
        if not self._depth:
            self._paused_at = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and self._began is not None:
                self._began += time.perf_counter() - self._paused_at
