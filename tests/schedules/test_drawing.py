"""Schedules and route tables as pictures and traces."""

import re

from schedule_rows import schedule_of

from ds_local.schedules.drawing import band_of, chrome_trace, draw, draw_routes
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, several_steps, simulate


def test_a_route_table_has_a_cell_for_each_route():
    table = make_routes("overlapping", 3, 2, "mean")
    text = draw_routes([("", table)]).file()
    tips = re.findall(r"<title>loss (\d) trains segment (\d)</title>", text)
    routes = {(str(loss), str(s)) for loss, row in table.weights.items() for s in row}
    assert set(tips) == routes
    assert text.count(">0.5<") == 4


def drawn(*parts, stages, segments=None):
    schedule = schedule_of(*parts, stages=stages, segments=segments)
    return simulate(schedule, Costs()), several_steps(schedule, Costs(), 1)


def test_a_trace_has_a_lane_for_each_stage_in_microseconds():
    timeline, _ = drawn(("local", None, 1), stages=2)
    events = chrome_trace(timeline, 1000)["traceEvents"]
    assert sorted((e["tid"], e["ts"], e["name"], e["dur"]) for e in events if e["ph"] == "X") == [
        (0, 0, "F0", 1000),
        (0, 1000, "B0", 2000),
        (1, 1000, "F0", 1000),
        (1, 2000, "B0", 2000),
    ]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["stage 0", "stage 1"]


def test_pieces_name_what_is_not_the_same_for_all():
    plain = band_of(*drawn(("local", None, 1), stages=2))
    assert {piece.name for piece in plain.pieces} == {"0"}
    assert plain.pieces[0].tip == "micro-batch 0, segment 0: forward"
    mixed = band_of(*drawn(("backprop", None, 1), ("local", None, 1), stages=1, segments=2))
    assert "1:0" in {piece.name for piece in mixed.pieces}
    assert "micro-batch 1, segment 0: forward (local)" in {piece.tip for piece in mixed.pieces}


def test_a_band_says_what_a_step_takes():
    band = band_of(*drawn(("backprop", None, 2), stages=2), title="mine")
    assert band.title == "mine"
    assert band.note == "one step takes 9; in a long run 9 a step, idle 33%"
    assert (band.num_stages, len(band.pieces)) == (2, 8)


def test_a_picture_is_written(tmp_path):
    draw([band_of(*drawn(("local", None, 2), stages=2))], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
