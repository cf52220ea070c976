"""The charts of a run's report: which curves, and what they show."""

import re

from written_runs import write_run

from ds_local.charts.plots import Curve
from ds_local.training.report_charts import (
    curves_of,
    draw_idle,
    draw_link_waits,
    draw_losses,
    draw_norms,
    draw_pace,
    draw_rates,
    draw_step_times,
    without_start,
)
from ds_local.training.run_record import RunRecord


def record(tmp_path, **how):
    return RunRecord(write_run(tmp_path / "run", **how))


def test_a_curve_for_each_segment_and_stage(tmp_path):
    run = record(tmp_path)
    norms, idle = curves_of(run, "grad_norm"), curves_of(run, "idle_share", "stage")
    assert [curve.name for curve in norms] == ["segment 0", "segment 1"]
    assert [curve.points[0] for curve in norms] == [(2, 1.5), (2, 2.5)]
    assert [(curve.name, curve.points[-1]) for curve in idle] == [
        ("stage 0", (40, 0.02)),
        ("stage 1", (40, 0.4)),
    ]


def test_the_fall_at_the_start_does_not_set_the_axis():
    points = [(0, 99.0), (5, 50.0), (6, 4.0), (100, 3.0)]
    assert without_start([Curve("", "", points)]) == 4.0 * 1.02
    assert without_start([Curve("", "", [(1, None)])]) is None


def test_losses_have_validations_as_dots_and_events_as_crosses(tmp_path):
    svg = draw_losses(record(tmp_path, event=13))
    assert [curve["name"] for curve in svg.data["curves"]] == [
        "",
        "segment 0 measured",
        "",
        "segment 1 measured",
    ]
    assert svg.inline().count("\u00d7</text>") == 1
    assert svg.data["to"] == 40


def test_phases_are_shaded(tmp_path):
    phases = [{"until_step": 30, "mode": "local"}, {"mode": "backprop"}]
    text = draw_losses(record(tmp_path, phases=phases)).inline()
    assert ">local</text>" in text
    assert ">backprop</text>" in text


def test_rates_that_are_the_same_are_one_curve(tmp_path):
    data = draw_rates(record(tmp_path)).data
    assert [curve["name"] for curve in data["curves"]] == ["all segments"]
    assert data["curves"][0]["points"][-1] == (40, 0.04)


def test_pace_idle_share_and_norms_are_those_of_the_run(tmp_path):
    run = record(tmp_path)
    assert "Tokens per second: 256 in the median" in draw_pace(run).inline()
    idle = draw_idle(run).data
    assert idle["percent"]
    assert idle["curves"][1]["points"][0] == (2, 0.4)
    assert draw_norms(run).data["curves"][0]["points"][0] == (2, 1.5)


def test_a_step_is_work_and_waiting(tmp_path):
    text = draw_step_times(record(tmp_path)).inline()
    found = re.findall(r"<title>(works|waits) ([\d.]+) s</title>", text)
    assert found == [("works", "1.96"), ("waits", "0.04"), ("works", "1.2"), ("waits", "0.8")]


def test_the_link_that_was_waited_for_has_a_colour_and_a_name(tmp_path):
    text = draw_link_waits(record(tmp_path)).inline()
    lanes = re.findall(r"<title>steps (\d+) to (\d+): idle ([\d.]+)%", text)
    assert lanes[0] == ("2", "2", "40.0")
    assert len(lanes) == 20
    assert text.count(">activation link 0 -&gt; 1</text>") == 1
