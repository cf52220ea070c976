"""What a section comes to for a number of segments."""

import pytest

from ds_local.config.files import local_parallel
from ds_local.schedules.run_plan import RunPlan


def notes(section, stages, micro_batches=4):
    return RunPlan(local_parallel({"local_parallel": section}), stages, micro_batches).notes


@pytest.mark.parametrize(
    ("section", "stages", "same"),
    [
        ({"mode": "chunked"}, 2, "chunked(2) is the same as backprop"),
        ({"mode": "interlocking"}, 2, "interlocking(2) is the same as backprop"),
        ({"mode": "chunked", "window": 4}, 4, "chunked(4) is the same as backprop"),
        ({"mode": "interlocking", "window": 1}, 4, "interlocking(1) is the same as local"),
        ({"mode": "overlapping", "window": 1}, 3, "overlapping(1) is the same as local"),
        ({"mode": "shifted_chunked", "window": 1}, 3, "shifted_chunked(1) is the same as local"),
        ({"mode": "overlapping"}, 2, "overlapping(2) is the same as deep_supervision"),
        ({"mode": "local"}, 1, "on 1 segment local is the same as backprop"),
        (
            {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "chunked"}]},
            2,
            "chunked(2) is the same as backprop",
        ),
        (
            {"phases": [{"until_step": 2, "mode": "chunked"}, {"mode": "backprop"}]},
            2,
            "chunked(2) is the same as backprop",
        ),
    ],
)
def test_rows_that_are_plainer_ones(section, stages, same):
    (note,) = notes(section, stages)
    assert note.endswith(same)
    assert note.startswith(f"on {stages} segment")


@pytest.mark.parametrize(
    ("section", "stages"),
    [
        ({"mode": "chunked"}, 4),
        ({"mode": "interlocking"}, 3),
        ({"mode": "shifted_chunked"}, 2),  # backprop in every second step only
        ({"mode": "overlapping", "combine": "mean"}, 2),
        ({"mode": "deep_supervision", "weights": [0.5, 1]}, 2),
        ({"mode": "local"}, 2),
        ({"mode": "backprop"}, 1),
    ],
)
def test_rows_that_are_rows_of_their_own(section, stages):
    assert notes(section, stages) == []


def test_the_simulator_says_it_beside_the_figures(capsys, monkeypatch):
    import json

    from ds_local.cli import simulate

    arguments = ["--stages", "2", "--micro-batches", "4", "--mode", "chunked", "--json", "-"]
    monkeypatch.setattr("sys.argv", ["simulate.py", *arguments])
    assert simulate.main() == 0
    shown = capsys.readouterr()
    assert "chunked(2) is the same as backprop" in shown.err
    assert json.loads(shown.out)["stages"] == 2
