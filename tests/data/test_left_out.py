"""What was left out, and how much may be."""

import pytest
from sentences import one_sentence

from ds_local.data.left_out import Skipped
from ds_local.errors import DataError


def test_the_first_names_of_a_reason_are_kept():
    skipped = Skipped()
    assert not skipped
    for number in range(7):
        skipped.add("empty", f"{number}.txt")
    skipped.add("hidden", ".git")
    assert str(skipped) == ("7 empty (0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ...), 1 hidden (.git)")
    again = Skipped(skipped.counts, skipped.names)
    assert str(again) == str(skipped)
    assert again


def test_the_first_malformed_row_is_refused():
    with one_sentence("a.jsonl, line 3 is broken; --max-malformed N", error=DataError):
        Skipped().malformed("a.jsonl, line 3", "is broken")


def test_a_number_of_malformed_rows_is_left_out():
    skipped = Skipped(max_malformed=2)
    skipped.malformed("a, line 1", "is broken")
    skipped.malformed("a, line 2", "is broken")
    skipped.check_share()
    with one_sentence("3 rows are malformed, more than --max-malformed 2: a, line 1 is broken"):
        skipped.malformed("a, line 3", "is broken")


@pytest.mark.parametrize(("rows", "allowed"), [(100, True), (99, False)])
def test_a_share_of_malformed_rows_is_left_out(rows, allowed):
    skipped = Skipped(max_malformed=0.02)
    skipped.rows = rows
    for number in range(2):
        skipped.malformed(f"a, line {number}", "is broken")
    if allowed:
        skipped.check_share()
    else:
        with one_sentence("2 rows are malformed, 2.02% of 99, more than --max-malformed 0.02"):
            skipped.check_share()
