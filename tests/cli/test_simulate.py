"""`simulate`: figures of hand-worked schedules, and what it refuses."""

import json

import pytest
from commands import command
from sentences import assert_one_sentence

from ds_local.cli.simulate import WIDEST, main

TWO = ["--stages", "2", "--micro-batches", "2"]


def report(capsys, *arguments):
    assert main([*TWO, *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_figures_of_the_contract(capsys):
    found = report(capsys, "--mode", "backprop")
    assert found["makespan"] == 9
    assert found["steady_period"] == 9
    assert found["idle_share"] == pytest.approx(1 / 3)
    assert found["peak_live_micro_batches"] == [2, 1]
    assert found["messages"] == {"activations": 2, "gradients": 2}


def test_costs_are_those_of_the_command_line(capsys):
    costs = ["--forward", "2", "--input-grad", "3", "--weight-grad", "4", "--head", "1"]
    found = report(capsys, "--mode", "local", *costs)
    assert found["steady_period"] == 2 * (2 + 3 + 4 + 1)
    assert found["messages"] == {"activations": 2, "gradients": 0}


def test_several_schedules_are_a_list(capsys):
    found = report(capsys, "--mode", "local", "--compare", "gpipe", "zero_bubble")
    assert [one["schedule"] for one in found] == ["local", "gpipe", "zero_bubble(h1)"]


def test_the_grid_and_the_figures_are_shown(capsys):
    assert main([*TWO, "--mode", "local"]) == 0
    said = capsys.readouterr().out
    assert "local: 2 stages, 2 micro-batches, 7 ticks, idle 14%" in said
    assert "live micro-batches 1, 1; messages a step: 2 activations, 0 gradients" in said
    wide = ["--stages", "2", "--micro-batches", str(WIDEST + 1), "--mode", "local"]
    assert main(wide) == 0
    assert "ticks" not in capsys.readouterr().out


def test_files_are_written(tmp_path, capsys):
    kinds = {"--json": "a.json", "--trace": "t.json", "--html": "a.html"}
    more = [word for kind, name in kinds.items() for word in (kind, str(tmp_path / name))]
    assert main([*TWO, "--mode", "local", *more]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["makespan"] == 7
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) == 8 + 2
    assert "2 stages, 2 micro-batches" in (tmp_path / "a.html").read_text()


def test_more_backpropagation_than_there_is_is_refused():
    result = command("simulate", *TWO, "--mode", "local", "--backprop-micro-batches", 3)
    assert result.returncode != 0
    assert_one_sentence(result.stderr.strip(), "--backprop-micro-batches 3", "--micro-batches 2")


def test_a_model_gives_costs_in_forwards_of_a_block(capsys):
    found = report(capsys, "--mode", "local", "--model", "gpt2-nano.json", "--seq-len", "64")
    assert len(found["auxiliary_flops"]) == 2
    assert 0 < found["auxiliary_flops"][0] < 1
    assert found["auxiliary_flops"][1] == 0


def test_an_order_is_written_and_read(tmp_path, capsys):
    path = tmp_path / "order.csv"
    assert main([*TWO, "--mode", "backprop", "--csv", str(path)]) == 0
    capsys.readouterr()
    assert path.read_text() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n")
    found = report(capsys, "--mode", "backprop", "--schedule", str(path))
    assert (found["makespan"], found["peak_live_micro_batches"]) == (9, [2, 2])
    path.write_text("0F0,0F1,0B0,0B1\n1B0,1F0,1F1,1B1\n")
    result = command("simulate", *TWO, "--mode", "backprop", "--schedule", path)
    assert result.returncode != 0
    assert "an action comes before what it needs" in result.stderr
    assert "stage 1  [1B0] 1F0 1F1 1B1" in result.stderr


def test_orders_that_follow_each_other_are_numbered(tmp_path):
    path = tmp_path / "order.csv"
    assert main([*TWO, "--mode", "shifted_chunked", "--csv", str(path)]) == 0
    written = sorted(one.name for one in tmp_path.iterdir())
    assert written == ["order-1.csv", "order-2.csv"]
    paths = [str(tmp_path / name) for name in written]
    assert main([*TWO, "--mode", "shifted_chunked", "--schedule", *paths]) == 0


@pytest.fixture
def profile(tmp_path):
    """Of backpropagation on two segments: no auxiliary head."""
    parts = {name: [1.0, 1.0] for name in ("forward", "input_grad", "weight_grad", "link")}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"costs": {**parts, "head": [0.0, 3.0]}}))
    return str(path)


def test_a_profile_is_simulated_with_what_it_measured(profile, capsys):
    found = report(capsys, "--mode", "backprop", "--compare", "1f1b", "--profile", profile)
    assert [one["steady_period"] > 0 for one in found] == [True, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mode", "local"], "without the auxiliary heads of segments 0, which local trains"),
        (["--mode", "backprop", "--segments-per-stage", "2"], "is of 2 segments, but"),
        (["--mode", "backprop", "--compare", "interleaved"], "but interleaved"),
    ],
)
def test_a_profile_of_something_else_is_refused(profile, options, said):
    result = command("simulate", *TWO, *options, "--profile", profile)
    assert result.returncode != 0
    assert_one_sentence(result.stderr.strip(), profile, said, "profile a run with")
