"""Says who everybody waits for when a run stops moving.

Each rank's watchdog looks at what its main thread waits for. When that takes beyond
`link.warn_seconds` it asks the others what they do; the lowest rank among those that wait long puts
the answers together and says who is waited for but waits for nobody. Nothing is ended here: that is
what `link.timeout_seconds` is for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from ds_local.links.failures import is_late_comer, missing
from ds_local.links.logs import LOG, say
from ds_local.links.notices import Absence, Answer, Notices
from ds_local.links.observer import Wait

_PATIENCE_SECONDS = 5.0  # with a rank that is asked what it does
TICK_SECONDS = 0.25  # between two looks at what is to be arranged with other ranks


def explain(answers: Mapping[int, Answer], name: Callable[[int], str]) -> str:
    """A sentence for the whole run: who is waited for without waiting, then who waits for whom.

    Args:
        answers: of every rank to the question for its state.
    """
    guilty = missing(answers, name, lambda a: isinstance(a, Absence) or is_late_comer(a))
    waits = [
        Wait(*answer["waiting"]).sentence(name(rank), name)
        for rank, answer in sorted(answers.items())
        if isinstance(answer, dict) and answer.get("waiting")
    ]
    return "; ".join([f"no progress: {guilty or 'all wait for each other'}", *waits])


class Watchdog:
    """A thread that looks on. Stop it with `stop`.

    Args:
        notices: of this process.
        name: of a rank, in sentences.
        warn_seconds: a wait beyond this is told.
        chores: called now and then, for what is to be arranged with other ranks.
        say: called with the sentence, on one rank of those that wait.
    """

    def __init__(
        self,
        notices: Notices,
        name: Callable[[int], str],
        warn_seconds: float,
        chores: Iterable[Callable[[], None]] = (),
        say: Callable[[str], None] = say,
    ) -> None:
        self._notices, self._name, self._warn_seconds = notices, name, warn_seconds
        self._chores, self._say = list(chores), say
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _watch(self) -> None:
        looked = told = time.perf_counter()
        while not self._stopped.wait(min(TICK_SECONDS, self._warn_seconds / 4)):
            try:
                for chore in self._chores:
                    chore()
                now = time.perf_counter()
                if now - looked >= self._warn_seconds / 4:
                    looked = now
                    if now - told >= self._warn_seconds and self._look():
                        told = time.perf_counter()
            except Exception as error:  # a watchdog that dies is worse than one that errs
                LOG.info("watchdog: %r", error)

    def _look(self) -> bool:
        """Has this rank waited long?"""
        wait = self._notices.observer.state()["waiting"]
        if wait is None or wait.seconds < self._warn_seconds:
            return False
        LOG.warning("%s", wait.sentence(self._name(self._notices.rank), self._name))
        # who has stopped answers never; that must be said before the limits of waits end the run
        patience = min(self._warn_seconds, _PATIENCE_SECONDS)
        for rank in range(self._notices.rank):
            answer = self._notices.ask(rank, "state", seconds=patience)
            theirs = answer.get("waiting") if isinstance(answer, dict) else None
            if theirs and Wait(*theirs).seconds >= self._warn_seconds / 2:
                return True  # that one says it
        answers = self._notices.ask_all("state", seconds=patience)
        answers[self._notices.rank] = self._notices.observer.state()
        self._say(explain(answers, self._name))
        return True
