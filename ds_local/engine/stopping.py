"""Leaving the training loop together, without a collective: every rank after the same step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from ds_local.links.notices import Notices

_DECISION_SECONDS = 30.0  # longest wait for the last step, once this rank is held


class Stopping:
    """One rank's part in agreeing on the last step.

    Stage 0 begins the steps, and activations carry onward that one is the last. With one replica
    its rank decides alone. With several the first of them holds all: from its question on none
    begins another step until it has been told which one is the last, the one after the furthest
    that any has begun. The answers come from threads, so nobody waits who is in a step.

    Args:
        notices: of this process; None where there is one rank alone.
        number: of the engine.
        first_ranks: of stage 0, one of each replica.
    """

    def __init__(self, notices: Notices | None, number: int, first_ranks: Sequence[int]) -> None:
        # set by `LocalPipelineEngine.request_stop`, also in a signal handler: no lock
        self.requested = False
        self._notices, self._first_ranks = notices, list(first_ranks)
        self._topics = [f"{topic}/{number}" for topic in ("stop", "hold", "last")]
        self._state = threading.Condition()
        self._begun, self._held = -1, False
        self._last: int | None = None
        self._arranged = False
        if notices is not None:
            stop, hold, last = self._topics
            notices.answer(stop, self._stop)
            notices.answer(hold, self._hold)
            notices.answer(last, self._end)

    @property
    def pending(self) -> bool:
        """Is this rank to stop as soon as all agree?"""
        return self.requested or self._held

    def is_last(self, step: int) -> bool:
        """Does the run end after this step, which is about to begin? For ranks of stage 0."""
        if self._notices is None or len(self._first_ranks) == 1:
            return self.requested
        with self._state:
            if self._held:
                self._state.wait_for(lambda: self._last is not None, _DECISION_SECONDS)
            self._begun = step
            return self._last is not None and step >= self._last

    def arrange(self) -> None:
        """Bring a request to where it is decided. Called now and then, beside the main thread."""
        if not self.requested or self._arranged or self._notices is None:
            return
        stop, hold, last = self._topics
        decides = self._first_ranks[0]
        if self._notices.rank != decides:
            self._arranged = isinstance(self._notices.ask(decides, stop), dict)
            return
        self._arranged = True
        if len(self._first_ranks) > 1:
            answers = self._notices.ask_all(hold, self._first_ranks)
            begun = [answer["begun"] for answer in answers.values() if isinstance(answer, dict)]
            step = max([*begun, self._hold()["begun"]]) + 1
            self._end({"step": step})
            self._notices.ask_all(last, self._first_ranks, step=step)

    # --- answers, in the thread that gives them -------------------------------------------------

    def _stop(self, _: Any = None) -> None:
        self.requested = True

    def _hold(self, _: Any = None) -> dict[str, int]:
        with self._state:
            self._held = True
            return {"begun": self._begun}

    def _end(self, question: dict[str, Any]) -> None:
        with self._state:
            self._last = question["step"]
            self._state.notify_all()
