"""The instructions of the last steps with their times, for a trace."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

KEPT = 20_000  # instructions

Event = tuple[str, int, float, float]  # (name of the instruction, step, start, end)


class Recorder:
    """Call it around an instruction; attach it to an engine as `engine.recorder`."""

    def __init__(self, device: torch.device) -> None:
        self.events: deque[Event] = deque(maxlen=KEPT)
        self._device = device

    def record(self, name: str, step: int, run: Callable[[], None]) -> None:
        start = self._now()
        run()
        self.events.append((name, step, start, self._now()))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # only while recording
        return time.time()
