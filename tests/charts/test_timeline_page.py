"""The time lines of `simulate`, as SVG and as a page to zoom and point at."""

import json
import re

import pytest
from browser import opened, shown

from ds_local.charts.maps import Panel, draw_map
from ds_local.charts.style import SERIES
from ds_local.charts.timelines import draw_bands
from ds_local.cli.simulate import main
from ds_local.schedules.drawing import band_of, draw_routes
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, several_steps, simulate


def write_page(tmp_path, *more):
    page = tmp_path / "schedules.html"
    arguments = ["--stages", "2", "--micro-batches", "2", "--mode", "local", "--compare", "1f1b"]
    assert main([*arguments, "--html", str(page), *more]) == 0
    return page


def data_of(page):
    return json.loads(
        re.search(r'id="data">(.*?)</script>', page.read_text()).group(1).replace("<\\/", "</")
    )


def test_the_page_holds_every_action_of_every_step(tmp_path, capsys):
    data = data_of(write_page(tmp_path, "--steps", "3"))
    assert [band["title"] for band in data["bands"]] == ["local", "1F1B"]
    for band in data["bands"]:
        assert len(band["pieces"]) == 3 * 2 * 2 * 2  # steps, stages, micro-batches, F and B
        assert band["note"].startswith("3 steps take ")
    assert data["end"] == max(band["end"] for band in data["bands"]) == 27
    stage, step, kind, start, end, name, tip = data["bands"][0]["pieces"][0]
    assert (stage, step, kind, start, end, name) == (0, 0, "F", 0, 1, "0")
    assert data["tips"][tip] == "micro-batch 0, segment 0: forward"


def test_a_title_says_what_is_drawn(tmp_path, capsys):
    bands = data_of(write_page(tmp_path, "--steps", "1", "--head", "0.5"))["bands"]
    assert bands[0]["note"] == "one step takes 7.5; in a long run 7 a step, idle 7%"
    assert bands[0]["end"] == 7.5


def test_what_is_there_is_replaced_only_if_it_is_ours(tmp_path, capsys):
    page = write_page(tmp_path)
    write_page(tmp_path)
    page.write_text("<p>mine</p>")
    with pytest.raises(SystemExit):
        write_page(tmp_path)
    assert page.read_text() == "<p>mine</p>"


def test_it_works_in_a_browser(tmp_path, capsys):
    page = write_page(tmp_path)
    look = """
    const lanes = document.getElementById('lanes'), box = lanes.getBoundingClientRect();
    const tip = document.getElementById('tip');
    function point(x, y) {
      const at = {clientX: box.left + x, clientY: box.top + y};
      lanes.dispatchEvent(new MouseEvent('mousemove', at));
      show(tip.hidden ? 'nothing' : tip.textContent);
    }
    const wide = box.width - 70 - 16;
    point(70 + wide * 0.5 / 18, 34 + 13);
    point(70 + wide * 0.5 / 18, 34 + 26 + 13);
    point(5, 5);
    for (let n = 0; n < 3; n++) document.querySelector('[data-do=in]').click();
    document.querySelector('[data-do=on]').click();
    point(70, 34 + 13);
    const pixels = lanes.getContext('2d').getImageData(0, 0, lanes.width, lanes.height).data;
    show(new Set(new Uint32Array(pixels.buffer)).size > 10);
    """
    dom, complaints = opened(page, tmp_path, look)
    assert complaints == []
    first, second, nowhere, zoomed, drawn = shown(dom)
    assert first == "local · stage 0 · step 1 · micro-batch 0, segment 0: forward · 0 to 1 (1)"
    assert second == "local · stage 1 · idle · 0 to 1 (1)"
    assert nowhere == "nothing"
    # an eighth of 18 around the middle, moved on by a quarter of itself: begins at 8.4375
    what = "micro-batch 0, segment 0: backward, both gradients"
    assert zoomed == f"local · stage 0 · step 2 · {what} · 7 to 9 (2)"
    assert drawn == "true"


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


def test_a_map_has_the_colour_and_the_value_of_what_is_best():
    cells = [
        [{"backprop": 0.5, "chunked 2": 0.4}, {"backprop": 0.5, "chunked 2": 0.6}],
        [{"backprop": 0.3, "chunked 2": 0.3}, {"backprop": 1.0, "chunked 2": 2.0}],
    ]
    axes = ("up", ["1", "2"]), ("right", ["x", "y"])
    text = draw_map("t", [Panel("p", cells)], *axes, "time").file()
    found = re.findall(
        r'<rect[^>]*fill="(#\w+)"[^>]*><title>backprop: [^<]*</title></rect><text[^>]*>([\d.]+)<',
        text,
    )
    first, second = SERIES[:2]
    assert found == [(second, ".40"), (first, ".50"), (first, ".30"), (first, "1.00")]


def test_a_route_table_has_a_cell_for_each_route():
    table = make_routes("overlapping", 3, 2, "mean")
    text = draw_routes([("", table)]).file()
    tips = re.findall(r"<title>loss (\d) trains segment (\d)</title>", text)
    routes = {(str(loss), str(s)) for loss, row in table.weights.items() for s in row}
    assert set(tips) == routes
    assert text.count(">0.5<") == 4
