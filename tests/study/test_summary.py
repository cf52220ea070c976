"""Rows of the table, each beside its yardstick."""

from study_runs import run_of

from ds_local.study.summary import summary
from ds_local.study.tables import ratio_markdown


def test_each_schedule_has_its_own_yardstick():
    machine = {"device": "cpu", "processor": "x"}
    losses = {"backprop": 2.0, "chunked 2": 2.25, "backprop, WSD": 1.5, "chunked 2, WSD": 1.625}
    results = [
        run_of(method, lr_factor=1.0)._asdict()
        | {"loss": loss, "tokens": 10, "curve": [(10, loss)], "machine": machine}
        | {"exits": {"1": 1.75, "3": loss} if "chunked" in method else {"3": loss}}
        for method, loss in losses.items()
    ]
    rows = {row["method"]: row for row in summary("cpu", results)}
    assert {name: row["gap_nats"] for name, row in rows.items()} == {
        "backprop": 0.0,
        "chunked 2": 0.25,
        "backprop, WSD": 0.0,
        "chunked 2, WSD": 0.125,
    }
    assert [row["depth_pays"] for row in rows.values()] == [False, False, True, True]
    table = ratio_markdown({"cpu-gpt2-ratio": list(rows.values())})
    assert "| chunked 2, WSD, K = 4 | 1,600 | 1 | 1.6250 | 1.7500 | +0.1250 | +13.3 % |" in table
    assert "| backprop, K = 4 | 1,600 | 1 | 2.0000 | - | +0.0000 | +0.0 % |" in table
    assert "**With 1,600 steps depth does not pay yet**" in table
    assert "depth" not in ratio_markdown({"cpu-gpt2-ratio": list(rows.values())[2:]})


def test_a_row_without_a_yardstick_is_left_out(capsys):
    """A method run for longer than backprop was, and a preset in which backprop was not run at
    all."""
    machine = {"device": "cpu", "processor": "x"}
    backprop = run_of("backprop", lr_factor=1.0)._asdict() | {
        "loss": 2.0,
        "tokens": 10,
        "curve": [(10, 2.0)],
        "machine": machine,
    }
    eight = run_of("local", segments=8)._asdict() | {
        "loss": 2.1,
        "tokens": 10,
        "curve": [(10, 2.1)],
        "machine": machine,
    }
    longer = {**eight, "step_factor": 2.0}
    rows = summary("cpu", [backprop, eight, longer])
    assert [(row["method"], row["segments"], row["step_factor"]) for row in rows] == [
        ("backprop", 4, 1.0),
        ("backprop", 8, 1.0),
        ("local", 8, 1.0),
    ]
    assert "local is left out" in capsys.readouterr().err
    assert rows[1]["perplexity"] == rows[0]["perplexity"]  # where it is cut changes nothing
    assert summary("cpu", [eight]) == []
