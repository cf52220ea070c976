"""`study`: what it is asked for, and the pages of a folder without runs."""

import pytest
from commands import command

from ds_local.cli.study import parse_arguments, table
from ds_local.study.methods import METHODS


def test_methods_are_listed():
    result = command("study", "methods")
    assert result.stdout.splitlines() == list(METHODS)


def test_what_is_not_said_is_everything_once():
    args = parse_arguments(["run"])
    assert args.methods == list(METHODS)
    assert (args.segments, args.seeds, args.lr_factors, args.step_factors) == ([4], [1], [1], [1])
    given = parse_arguments(["run", "--methods", "local", "--lr-factors", "0.5", "2"])
    assert (given.methods, given.lr_factors) == (["local"], [0.5, 2.0])


@pytest.mark.parametrize(
    ("option", "value"),
    [("--methods", "nothing"), ("--preset", "x"), ("--lr-factors", "0"), ("--segments", "0")],
)
def test_what_there_is_not_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["run", option, value])
    assert f"argument {option}" in capsys.readouterr().err


def test_without_a_finished_run_no_page_is_touched(tmp_path, capsys):
    docs = tmp_path / "docs"
    assert table(tmp_path / "study", docs) == 1
    assert "no backprop run is finished yet" in capsys.readouterr().err
    assert not (docs / "quality.json").exists()
    assert not list((docs / "results").iterdir())
