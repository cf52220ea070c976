"""`plan`: what it says of a small cluster."""

import json
from dataclasses import replace

import pytest

from ds_local.cli.plan import as_json, line, main, parse_arguments, report
from ds_local.cluster.candidates import GIB, Candidate, Price
from ds_local.cluster.job import CONFIG, START
from ds_local.cluster.learning import Learning
from ds_local.cluster.planner import Plan
from ds_local.errors import OutputError

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
    assert words[2:6] == ["3.0", "4.00", "1.00", "2.0"]
    assert line(BEST, None).count("2.0") == 0
    slower = replace(BEST, learning=Learning(1.5, "measured"))
    assert line(slower, 3.6e6).split()[4:6] == ["1.50", "3.0"]
    assert line(replace(BEST, learning=Learning(None, "")), 3.6e6).split()[4:6] == ["?", "2.0"]


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
    for more, needed in (["--tokens-only"], {1.0}), ([], {1.0, 1.1048}):
        assert main([*ARGUMENTS, *rows, *more, "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {one["candidate"]["row"] for one in found["best"]} == {"local", "backprop"}
        assert {one["learning"]["tokens"] for one in found["best"]} == needed
        worth = [one["tokens_per_second"] / one["learning"]["tokens"] for one in found["best"]]
        assert worth == sorted(worth, reverse=True)


def test_the_winner_is_written_ready_to_start(tmp_path, capsys):
    folder = tmp_path / "plan"
    rows = ["--rows", "local", "--batch-tokens", "4096", "--tokens", "40960"]
    assert main([*ARGUMENTS, *rows, "--write", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"bash {folder}/{START}" in said
    assert "1.10  local: local on 2 segments, 1 seed" in said
    config = json.loads((folder / CONFIG).read_text())
    assert config["scheduler"]["params"]["total_num_steps"] == 12  # 10 x 1.1048, rounded up
    assert config["local_parallel"]["mode"] == "local"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="mine"):
        main([*ARGUMENTS, *rows, "--write", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("option", ["--nodes", "--device-tflops"])
def test_numbers_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*ARGUMENTS, option, "0"])
    assert option in capsys.readouterr().err
