"""What the planner prints."""

from dataclasses import replace

from ds_local.cluster.candidates import GIB, Candidate
from ds_local.cluster.layout_table import line, report
from ds_local.cluster.learning import Learning
from ds_local.cluster.planner import Plan
from ds_local.cluster.prices import Price

BEST = Price(
    Candidate(2, 1, "local", "full", 4, 8), 2.0, 1000, 3 * GIB, {"auxiliary heads": 0.5}, 4e9, 5e9
)
WORSE = Price(Candidate(2, 1, "backprop", "", 4, 8), 4.0, 1000, GIB, {}, 4e9, 5e9)
HUGE = Price(Candidate(1, 2, "data parallel", "", 4, 8), 1.0, 1000, 90 * GIB, {}, 0, 0)


def test_a_layout_is_a_line_of_figures():
    # step 2 s for 1000 tokens: 500 a second, a run of 3.6 million tokens takes two hours
    words = line(BEST, 3.6e6).split()
    assert words[0] == "500"
    assert words[2:6] == ["3.0", "4.00", "1.00", "2.0"]
    assert line(BEST, None).count("2.0") == 0
    slower = replace(BEST, learning=Learning(1.5, "measured"))
    assert line(slower, 3.6e6).split()[4:6] == ["1.50", "3.0"]
    assert line(replace(BEST, learning=Learning(None, "")), 3.6e6).split()[4:6] == ["?", "2.0"]


def test_the_best_of_every_row_and_what_does_not_fit():
    text = report(Plan([BEST, WORSE], {}, {"data parallel": HUGE}, 3, 2), 8, None, 3, 65)
    assert "50% of the best  backprop: 2 stages" in text
    assert "does not fit    data parallel" in text
    assert "90 GiB on a device of 8" in text
    assert report(Plan([], {}, {}, 0, 0), 8, None, 3, 65).startswith("nothing fits")


def test_what_was_measured_far_from_the_model_has_a_sign():
    far = replace(BEST, learning=Learning(1.5, "local on 4 segments", far=True))
    assert line(far, 3.6e6).split()[4] == "1.50*"
    text = report(Plan([far, WORSE], {}, {}, 2, 2), 8, None, 3, 65)
    assert "1.50*  local: local on 4 segments" in text
    assert text.endswith("a factor of 2 from the 65 of this model: an order, not a figure")
    assert "*" not in report(Plan([BEST, WORSE], {}, {}, 2, 2), 8, None, 3, 65)
    assert "an order" not in report(Plan([far], {}, {}, 1, 1), 8, None, 3, None)
