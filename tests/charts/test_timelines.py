"""Time lines under each other, as a still picture."""

import re

from ds_local.charts.timelines import Band, Piece, draw_bands
from ds_local.schedules.drawing import band_of
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, several_steps, simulate


def svg_of(mode, stages=3, **options):
    schedule = make_schedule([(make_routes(mode, stages, **options), 2)], stages)
    return simulate(schedule, Costs()), several_steps(schedule, Costs(), 2)


def test_a_still_picture_has_a_box_for_each_action():
    timeline, events = svg_of("interlocking", window=2)
    text = draw_bands([band_of(timeline, events)], "label").file()
    for kind in "FBI":
        count = sum(event.action.kind == kind for event in events)
        boxes = re.findall(rf'class="{kind}(?: late)?"', text)
        assert len(boxes) == count + 1  # and one in the legend
    assert "prefers-color-scheme:dark" in text
    assert text.count("idle") == 2  # in the title and the legend


def test_a_piece_is_where_its_time_is():
    band = Band(
        "t", "n", 2, [Piece(1, 0, "F", 2.0, 3.0, "", "tip"), Piece(0, 0, "B", 0, 4, "", "")]
    )
    text = draw_bands([band], "label", width=480).file()
    # left 64, right 16: 100 units of the drawing to one of time; half a unit of a gap
    assert '<rect x="264.5" y="63.5" width="99" height="19" rx="2" class="F">' in text
    assert '<rect x="64.5" y="41.5" width="399" height="19" rx="2" class="B"/>' in text


def test_a_name_is_written_where_there_is_room():
    pieces = [Piece(0, 0, "F", 0, 1, "seven", ""), Piece(0, 0, "F", 1, 100, "eight", "")]
    text = draw_bands([Band("t", "", 1, pieces)], "label").file()
    assert ">eight</text>" in text
    assert ">seven</text>" not in text


def test_a_long_note_is_shortened_to_its_end():
    piece = Piece(0, 0, "F", 0, 1, "", "")
    note = "x" * 200 + "; idle 7%"
    for given, shown in ((note, "idle 7%"), ("short; idle 7%", "short; idle 7%")):
        assert f">{shown}</text>" in draw_bands([Band("t", given, 1, [piece])], "").file()


def test_steps_alternate_between_full_and_pale():
    pieces = [Piece(0, step, "U", step, step + 1, "", "") for step in (3, 4, 5)]
    text = draw_bands([Band("t", "", 1, pieces)], "").inline()
    assert re.findall(r'class="(U(?: late)?)"', text) == ["U", "U late", "U", "U"]  # one a legend's


def test_a_stretch_of_time_can_be_chosen():
    piece = Piece(0, 0, "F", 6, 8, "", "")
    text = draw_bands([Band("t", "", 1, [piece])], "", width=480, span=(5.0, 9.0)).inline()
    assert '<rect x="164.5" y="41.5" width="199"' in text
