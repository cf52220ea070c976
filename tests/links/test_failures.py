"""What failed first is told once; of a broken connection, who is missing; nobody who lives is
blamed."""

import pytest
from test_waiting import BROKEN, LATE

from ds_local.errors import ConfigError, TransportError
from ds_local.links import failures as module
from ds_local.links.failures import Failures, meeting
from ds_local.links.notices import Absence
from ds_local.links.observer import Wait

WAITS = {"doing": "step 3", "seconds": 9.0, "at": "a.py:1 in f", "waiting": Wait(1, "to send", 8.0)}
WORKS = {"doing": "step 3", "seconds": 9.0, "at": "b.py:2 in g", "waiting": None}


class Ranks:
    """Notices of rank 0 of four, with made-up answers."""

    rank, world_size = 0, 4

    def __init__(self, *answers):
        self.answers = dict(enumerate(answers, 1))
        self.told = []
        self.handlers = {}

    def answer(self, topic, handler):
        self.handlers[topic] = handler

    def tell_all(self, topic, **word):
        self.ask_all(topic, **word)

    def ask_all(self, topic, **question):
        if topic == "state":
            return self.answers
        self.told.append((topic, question))
        return {}


def engine(notices, number=1):
    return Failures(notices, number, lambda rank: f"stage {rank} (rank {rank})")


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("error", "answers", "said"),
    [
        (BROKEN, (WAITS, Absence.GONE, WORKS), "stage 2 (rank 2) is gone: its process has ended"),
        (LATE, (WAITS, Absence.GONE, WORKS), "stage 2 (rank 2) is gone: its process has ended"),
        (
            BROKEN,
            (Absence.GONE, Absence.GONE, Absence.SILENT),
            "stage 1 (rank 1) and stage 2 (rank 2) are gone: their processes have ended",
        ),
        (
            LATE,
            (WAITS, Absence.SILENT, WORKS),
            "stage 2 (rank 2) does not answer: stopped, or out of reach",
        ),
        (
            LATE,
            (WAITS, WAITS, WORKS),
            "stage 3 (rank 3) has not come: in step 3 for 9 s, b.py:2 in g",
        ),
        (BROKEN, (WAITS, WAITS, WORKS), "a connection broke, though all ranks answer"),
        (LATE, (WAITS, WAITS, WAITS), "a connection broke, though all ranks answer"),
    ],
)  # fmt: skip
def test_who_is_missing(error, answers, said):
    explained = engine(Ranks(*answers)).explained(error)
    assert isinstance(explained, TransportError)
    assert str(explained).startswith(said)
    living = [f"rank {rank})" for rank, answer in enumerate(answers, 1) if answer is WAITS]
    assert not any(name in str(explained) for name in living)


def test_a_rank_that_has_not_answered_yet_is_asked_again(monkeypatch):
    """Until the grace is over a broken connection is only blamed on who is gone."""
    monkeypatch.setattr(module, "_GRACE_SECONDS", 60.0)
    ranks = Ranks(WORKS, Absence.SILENT, WORKS)
    monkeypatch.setattr(module.time, "sleep", lambda _: ranks.answers.update({3: Absence.GONE}))
    assert str(engine(ranks).explained(BROKEN)).startswith("stage 3 (rank 3) is gone")


def test_what_a_rank_said_comes_before_what_can_be_seen():
    ranks = Ranks(Absence.GONE, WORKS, WORKS)
    known = engine(ranks)
    ranks.handlers["failed"](
        {"number": 1, "reason": "stage 1 (rank 1) at step 5: the disk is on fire"}
    )
    ranks.handlers["failed"]({"number": 1, "reason": "stage 2 (rank 2): a consequence"})
    explained = known.explained(BROKEN)
    reason = "stage 1 (rank 1) at step 5: the disk is on fire"
    assert str(explained) == f"the run ended elsewhere: {reason}"
    assert explained.reason == reason
    known.report_error(explained, "stage 0 (rank 0)")
    assert ranks.told == []  # everybody knows


def test_a_failure_is_told_once_and_other_errors_stay_as_they_are():
    ranks = Ranks(WORKS, WORKS, WORKS)
    own = engine(ranks)
    error = KeyError("labels")
    assert own.explained(error) is error
    own.report_error(error, "stage 0 (rank 0) at step 5")
    own.report_error(ValueError("another"), "stage 0 (rank 0) at step 5")
    assert ranks.told == [
        ("failed", {"number": 1, "reason": "stage 0 (rank 0) at step 5: KeyError('labels')"})
    ]


def test_engines_of_one_process_do_not_quote_each_other():
    ranks = Ranks(WAITS, WAITS, WAITS)
    first, second = engine(ranks, 1), engine(ranks, 2)
    ranks.handlers["failed"]({"number": 1, "reason": "of the first"})
    assert first.first == "of the first"
    assert second.first is None
    assert Failures(ranks).first == "of the first"  # whoever left the engine, or has none yet


def test_what_happens_around_the_engines_ends_them_all():
    ranks = Ranks(WAITS, WAITS, WAITS)
    Failures(ranks)
    ranks.handlers["failed"]({"number": 0, "reason": "rank 1: no memory"})
    assert engine(ranks).first == "rank 1: no memory"


def test_a_meeting_explains_a_break_and_passes_the_rest_on():
    ranks = Ranks(WAITS, Absence.GONE, WAITS)
    own = engine(ranks)
    with (
        pytest.raises(TransportError, match=r"^stage 2 \(rank 2\) is gone"),
        meeting("the save", own),
    ):
        raise BROKEN
    assert [topic for topic, _ in ranks.told] == ["failed"]
    with pytest.raises(ConfigError, match="all have it"), meeting("the loading", engine(ranks, 2)):
        raise ConfigError("all have it")
    assert len(ranks.told) == 1
