"""The judge itself: what it takes for right and for wrong."""

import json
import os
import signal

import corruptions
import fill
import inputs
import kills
import nonfinite
import pytest
import settings
import stops
from judging import blamed, differences, last_words, named
from workbench import with_changes

CAMPAIGNS = (kills, settings, inputs, corruptions, nonfinite, stops, fill)


class Said:
    """Ranks that ended with these statuses and words."""

    def __init__(self, *ranks):
        self._ranks = ranks

    def statuses(self):
        return [status for status, _ in self._ranks]

    def output(self, rank):
        return self._ranks[rank][1]


DEAD = (-9, "")


@pytest.mark.parametrize(
    ("others", "wrong"),
    [
        ([(1, "TransportError: stage 1 (rank 1) is gone")], None),
        ([(0, "finished at step 12")], None),
        ([(1, "TransportError: the connection is gone")], "does not name"),
        ([(1, "RuntimeError: rank 2 is gone")], "does not name"),
        ([(1, "TransportError: rank 1 is gone, rank 2 too")], "blames rank 2"),
        ([(1, "TransportError: rank 0 saw that rank 1 is gone")], None),
        ([(-11, "rank 1 is gone")], "status -11"),
    ],
)
def test_who_is_blamed(others, wrong):
    found = blamed(Said(*others, DEAD), 1)
    assert found == [] if wrong is None else wrong in found[0]


def test_last_words_are_the_last_error_not_the_last_line():
    assert last_words("step 1\nConfigError: no\nbye\n") == "ConfigError: no"
    assert last_words("usage: x\ntrain.py: error: argument --a: bad\n") == "argument --a: bad"
    assert last_words("all is well\n") == ""
    assert named("rank 1 and (rank 12)") == ["rank 1", "rank 12"]


def test_every_difference_between_runs_is_found():
    whole = {
        "latest": "global_step2",
        "tensors": {"a.pt": "1", "b.pt": "2"},
        "figures": ["x", "x", "y"],
    }
    assert differences(whole, whole) == []
    assert "global_step1" in differences({**whole, "latest": "global_step1"}, whole)[0]
    assert "b.pt" in differences({**whole, "tensors": {"a.pt": "1", "b.pt": "3"}}, whole)[0]
    assert differences({**whole, "tensors": {**whole["tensors"], "c.pt": "1"}}, whole)
    assert (
        "1 rows missing" in differences({**whole, "figures": ["x", "y"]}, whole)[0]
    )  # one of a double
    assert "1 unexpected" in differences({**whole, "figures": ["x", "x", "y", "y"]}, whole)[0]


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda module: module.__name__)
def test_cases_follow_from_the_seed_and_are_plain_json(campaign):
    first, again = campaign.cases(0, 60), campaign.cases(0, 60)
    assert json.dumps(first) == json.dumps(again)
    assert json.dumps(first) != json.dumps(campaign.cases(1, 60))
    assert len(first) == 60
    assert json.dumps(campaign.cases(0, 20)) == json.dumps(first[:20]) or campaign in (
        corruptions,
        stops,
    )


def test_settings_reach_every_place_before_any_a_second_time():
    found = settings.cases(0, 10**6)
    keys = {json.dumps(case, sort_keys=True) for case in found}
    assert len(keys) > 0.98 * len(found) > 1000
    first = settings.cases(
        0, len(settings.PLACES) + len(settings.OPTIONS) + len(settings.MODEL_KEYS) + 1
    )
    assert len({tuple(case["names"]) for case in first}) > 0.7 * len(first)


def test_changes_to_json():
    content = {"a": {"b": [1, {"c": 2}]}, "d": 3}
    assert with_changes(content, {"a.b.1.c": 5, "d": None, "e.f": 1}) == {
        "a": {"b": [1, {"c": 5}]},
        "e": {"f": 1},
    }
    assert content == {"a": {"b": [1, {"c": 2}]}, "d": 3}


def test_every_damage_changes_the_bytes():
    content = bytes(range(256)) * 4
    for name, change in corruptions.BYTES.items():
        assert all(change(content, at) != content for at in (0.0, 0.3, 0.999)), name
    assert corruptions._edited(True, "another value") is False
    assert corruptions._edited("abc", "another value") == "ab0"
    assert corruptions._paths({"a": {"b": 1}}) == [("a",), ("a", "b")]


def test_a_process_dies_at_the_operation_it_is_told(tmp_path):
    """Killed before the fourth thing it does to a file, a process has done three."""
    import subprocess
    import sys

    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import hooks, os, pathlib
below = pathlib.Path({str(tmp_path)!r}, "in")
hooks.kill_at_operation(str(below), int(sys.argv[1]), {str(tmp_path / "count")!r}, armed=True)
(below / "a").mkdir()
open(below / "a" / "f", "w").write("12345678")
(below.parent / "elsewhere").write_text("x")
os.rename(below / "a" / "f", below / "g")
"""
    (tmp_path / "in").mkdir()
    # mkdir, open, before and in the middle of the write
    killed = subprocess.run([sys.executable, "-c", code, "4"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "in" / "a" / "f").read_text() == "1234"
    (tmp_path / "in" / "a" / "f").unlink()
    (tmp_path / "in" / "a").rmdir()
    subprocess.run([sys.executable, "-c", code, "0"], check=True)
    assert (tmp_path / "in" / "g").read_text() == "12345678"
    assert (tmp_path / "count").read_text() == "5"
