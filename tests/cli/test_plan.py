"""`plan`: what it says of a small cluster."""

import json

import pytest

from ds_local.cli.plan import as_json, line, main, parse_arguments, report
from ds_local.cluster.candidates import GIB, Candidate, Price
from ds_local.cluster.planner import Plan

BEST = Price(
    Candidate(2, 1, "local", "full", 4, 8), 2.0, 1000, 3 * GIB, {"auxiliary heads": 0.5}, 4e9, 5e9
)
WORSE = Price(Candidate(2, 1, "backprop", "", 4, 8), 4.0, 1000, GIB, {}, 4e9, 5e9)
HUGE = Price(Candidate(1, 2, "data parallel", "", 4, 8), 1.0, 1000, 90 * GIB, {}, 0, 0)

ARGUMENTS = [
    *(
        "--model",
        "gpt2-nano.json",
        "--nodes",
        "1",
        "--devices-per-node",
        "2",
        "--device-tflops",
        "1",
    ),
    *("--memory-gib", "8", "--link-gbps", "1", "--intra-gbps", "10"),
]


def test_a_layout_is_a_line_of_figures():
    # step 2 s for 1000 tokens: 500 a second, a run of 3.6 million tokens takes two hours
    words = line(BEST, 3.6e6).split()
    assert words[0] == "500"
    assert words[2:6] == ["3.0", "4.00", "5.00", "2.0"]
    assert line(BEST, None).count("2.0") == 0


def test_the_best_of_every_row_and_what_does_not_fit():
    args = parse_arguments(ARGUMENTS)
    text = report(Plan([BEST, WORSE], {}, {"data parallel": HUGE}, 3, 2), args)
    assert "50% of the best  backprop: 2 stages" in text
    assert "does not fit    data parallel" in text
    assert "90 GiB on a device of 8" in text
    assert report(Plan([], {}, {}, 0, 0), args).startswith("nothing fits")


def test_figures_for_programs():
    found = as_json(BEST)
    assert (found["tokens_per_second"], found["candidate"]["row"]) == (500.0, "local")
    assert found["loss"] == "75% of the step is waiting for other stages or links"


def test_a_whole_plan(capsys):
    rows = ["--rows", "local", "backprop", "--heads", "full", "--batch-tokens", "4096"]
    assert main([*ARGUMENTS, *rows, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["candidate"]["row"] for one in found["best"]} == {"local", "backprop"}
    speeds = [one["tokens_per_second"] for one in found["best"]]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize("option", ["--nodes", "--device-tflops"])
def test_numbers_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*ARGUMENTS, option, "0"])
    assert option in capsys.readouterr().err
