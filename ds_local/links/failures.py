"""What failed first, and who is missing: a sentence that blames no rank that lives.

The rank that fails tells all others, so the reason outlives it. Where a connection broke or a wait
ran out and nobody has told why, all ranks are asked: who is gone or does not answer is named, or
who is at work while the others wait. What a rank saw itself goes into its log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

from ds_local.errors import DsLocalError, TransportError, first_line
from ds_local.links import notices as the_notices
from ds_local.links.logs import LOG
from ds_local.links.notices import Absence, Answer, Notices
from ds_local.links.waiting import EVERYBODY, is_late, is_lost, waiting

_GRACE_SECONDS = 5.0  # for the rank that failed to say so, once its connections have broken
_TOPIC = "failed"
_MOST_CHARACTERS = 1000  # of a reason


class Failures:
    """What this rank knows of the first failure.

    Args:
        notices: of this process; None: nobody to tell or ask.
        number: of the engine. 0: whatever happens around the engines.
        name: of a rank, in sentences.
    """

    _alive: ClassVar[WeakSet[Failures]] = WeakSet()

    def __init__(
        self,
        notices: Notices | None,
        number: int = 0,
        name: Callable[[int], str] = lambda rank: f"rank {rank}",
    ) -> None:
        self.name = name
        self._notices, self._number = notices, number
        self._reasons = {} if notices is None else _reasons_of(notices)
        _report_uncaught()
        self._alive.add(self)

    @property
    def first(self) -> str | None:
        """The first failure of the run, if it is known: for an engine its own or one around the
        engines, around them whatever ended one."""
        if self._number:
            return self._reasons.get(self._number) or self._reasons.get(0)
        return next(iter(self._reasons.values()), None)

    def report(self, reason: str) -> None:
        """Tell all ranks why this one ends, unless the reason is known already."""
        if self._reasons.keys() & {self._number, 0}:
            return
        reason = self._reasons.setdefault(self._number, reason[:_MOST_CHARACTERS])
        LOG.info("telling all others that the run ends: %s", reason)
        if self._notices is not None:
            with waiting(EVERYBODY, "to hear of a failure"):
                self._notices.tell_all(_TOPIC, number=self._number, reason=reason)

    def report_error(self, error: BaseException, where: str) -> str:
        """`report` for an exception. Returns the first failure of the run."""
        self.report(getattr(error, "reason", None) or f"{where}: {_in_a_line(error)}")
        return self.first or ""

    def explained(self, error: BaseException) -> BaseException:
        """Of a lost connection: a `TransportError` that says what ended the run. Others stay."""
        if not is_lost(error):
            return error
        LOG.info("lost a connection: %s", error)
        reason = self.first or self._found_out(is_late(error))
        if reason is None:
            return TransportError(
                f"a connection broke, though all ranks answer; here: {_in_a_line(error)}"
            )
        elsewhere = "the run ended elsewhere: " if self.first else ""
        return TransportError(f"{elsewhere}{reason}", reason)

    def _found_out(self, late: bool) -> str | None:
        """Who is missing, by asking everybody; None where that does not tell."""
        if self._notices is None:
            return None
        deadline = time.monotonic() + _GRACE_SECONDS
        while True:
            with waiting(EVERYBODY, "to say what happened"):
                answers = self._notices.ask_all("state")
            found = self.first or missing(answers, self.name, is_gone)
            at_last = late or time.monotonic() > deadline
            for kind in (is_silent, is_late_comer)[: at_last + late]:
                found = found or missing(answers, self.name, kind)
            if found or at_last:
                return found or None
            time.sleep(0.2)


def _in_a_line(error: BaseException) -> str:
    """What an exception says."""
    if isinstance(error, LookupError) and not isinstance(error, DsLocalError):
        return repr(error)  # its text is a key alone
    return first_line(error)


def is_gone(answer: Answer) -> bool:
    return answer is Absence.GONE


def is_silent(answer: Answer) -> bool:
    return answer is Absence.SILENT


def is_late_comer(answer: Answer) -> bool:
    """Does this rank wait for nobody?"""
    return isinstance(answer, dict) and answer.get("waiting", "") is None


def missing(
    answers: Mapping[int, Answer], name: Callable[[int], str], kind: Callable[[Answer], bool]
) -> str:
    """A sentence about the ranks of this kind, and what they do; "" for none."""
    found: dict[tuple[str, str], list[str]] = {}
    for rank, answer in sorted(answers.items()):
        if kind(answer):
            found.setdefault(_what_it_does(answer), []).append(name(rank))
    return "; ".join(
        f"{' and '.join(names)} {what[len(names) > 1]}" for what, names in found.items()
    )


def _what_it_does(answer: Answer) -> tuple[str, str]:
    """Of one rank, and of several."""
    if isinstance(answer, Absence):
        return answer.value
    where = f"in {answer['doing']} for {answer['seconds']:.0f} s, {answer['at']}"
    return f"has not come: {where}", f"have not come: {where}"


_reasons: WeakKeyDictionary[Notices, dict[int, str]] = WeakKeyDictionary()


def _reasons_of(notices: Notices) -> dict[int, str]:
    """What ended each engine of this process, 0 for what is around them: found here, or told by
    another rank. A rank can be told before it has built that engine, or after it left it."""
    if notices not in _reasons:
        reasons = _reasons[notices] = {}

        def told(question: Mapping[str, Any]) -> None:
            reasons.setdefault(int(question["number"]), str(question["reason"]))
            LOG.info("told that the run ends: %s", question["reason"])

        notices.answer(_TOPIC, told)
    return _reasons[notices]


@contextmanager
def meeting(what: str, failures: Failures | None = None) -> Iterator[None]:
    """Around collectives of all ranks: others see what this rank is in, and a break names who is
    missing.

    Raises:
        TransportError: instead of the process group's errors.
    """
    notices = the_notices.current()
    with nullcontext() if notices is None else notices.observer.during(what):
        try:
            yield
        except Exception as error:
            if failures is None:
                failures = Failures(the_notices.current())  # they may have met inside
            explained = failures.explained(error)
            if explained is error:
                raise
            failures.report(getattr(explained, "reason", None) or _in_a_line(explained))
            raise explained from error


def report_uncaught(error: BaseException) -> None:
    """Tell the others of an error that ends this process."""
    for failures in [*Failures._alive, Failures(the_notices.current())]:
        rank = failures._notices.rank if failures._notices else 0
        failures.report_error(error, failures.name(rank))


def _report_uncaught() -> None:
    """Also of one that no command of ours catches."""
    before = sys.excepthook
    if before.__name__ == "_uncaught":
        return

    def _uncaught(kind: Any, error: Any, trace: Any) -> None:
        before(kind, error, trace)
        report_uncaught(error)

    sys.excepthook = _uncaught
