"""Curves and bars lie where their values are."""

import re
from itertools import pairwise

from ds_local.charts.plots import Curve, Mark, bars, chart, legend, number, ticks
from ds_local.charts.svg import Svg


def test_axes_have_round_numbers():
    assert ticks(0.0, 1.0, 5) == [
        (0.0, "0"),
        (0.2, "0.2"),
        (0.4, "0.4"),
        (0.6000000000000001, "0.6"),
        (0.8, "0.8"),
        (1.0, "1"),
    ]
    assert [text for _, text in ticks(0, 3e6, 3)] == ["0", "1M", "2M", "3M"]
    assert [text for _, text in ticks(0.0, 4e-4, 4)] == [
        "0",
        "0.0001",
        "0.0002",
        "0.0003",
        "0.0004",
    ]


def test_a_curve_is_where_its_values_are():
    drawing = chart(
        "t",
        [Curve("", "#123456", [(0, 0.0), (1, None), (2, 1.0)])],
        "x",
        "y",
        y_range=(0.0, 1.0),
        size=(200, 190),
    )
    # left 58, right 22, top 50, bottom 40
    assert 'd="M58 150M178 50"' in drawing.inline().replace(".0", "")


def test_numbers_are_short():
    texts = [number(v) for v in (0, 0.25, 1234.5, 12_345, 2.5e6, 3e9, 5e-5, -0.3)]
    assert texts == ["0", "0.25", "1234.5", "12.345k", "2.5M", "3G", "5.0e-5", "-0.3"]
    assert number(0, 20_000) == "0"
    assert number(5_000, 20_000) == "5k"


def test_an_axis_of_one_value_has_one_tick():
    assert ticks(3.0, 3.0) == [(3.0, "3")]


def test_bars_have_the_length_of_their_parts():
    parts = [[("F", 3.0, "works"), ("I", 1.0, "waits")], [("F", 2.0, "works")]]
    text = bars("t", ["one", "two"], parts, "s", width=514, entries=[("F", "works")]).inline()
    # left 90, right 24: 100 units to the second
    found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="18"', text)
    assert found == [("90", "41", "300"), ("390", "41", "100"), ("90", "65", "200")]
    assert "<title>waits</title>" in text
    assert ">works</text>" in text


def test_names_at_the_ends_do_not_lie_on_each_other():
    curves = [Curve(f"c{n}", "#123456", [(0, 0.0), (1, 1.0)]) for n in range(3)]
    text = chart("t", curves, "x", "y").inline()
    ends = [float(y) for y in re.findall(r'y="([\d.]+)" font-size="11.5"', text)]
    assert [round(b - a, 6) for a, b in pairwise(ends)] == [14.0, 14.0]


def test_what_was_not_measured_is_said():
    svg = chart("t", [Curve("a", "#123456", [(0, None)])], "x", "y")
    assert "nothing was measured" in svg.inline()
    assert svg.data is None


def test_a_page_gets_the_values_and_the_frame():
    curve = Curve("a", "#123456", [(2, 1.0), (4, 3.0)], dots=True)
    svg = chart("t", [curve], "step", "loss", [Mark(1, "event", bad=True)], size=(400, 200))
    assert svg.data["curves"] == [{"name": "a measured", "points": [(2, 1.0), (4, 3.0)]}]
    assert (svg.data["from"], svg.data["to"], svg.data["x"]) == (1, 4, "step")
    assert (svg.data["left"], svg.data["top"], svg.data["bottom"]) == (58, 50, 160)
    assert "\u00d7</text>" in svg.inline()


def test_a_legend_takes_as_many_lines_as_it_needs():
    svg = Svg(100, 10, "")
    legend(svg, 0, 0, [("F", "forward"), ("B", "backward"), ("track", "idle")])
    assert svg.height == 2 * 19 + 24
    assert re.findall(r'y="([\d.]+)" width="12"', svg.inline()) == ["0", "19", "38"]
