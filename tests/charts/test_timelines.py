"""Time lines under each other, as a still picture."""

import re

from ds_local.charts.timelines import draw_bands
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
