"""Maps of what is best."""

import re

import pytest

from ds_local.charts.maps import Panel, best, draw_map
from ds_local.charts.style import SERIES


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


def test_the_first_of_equals_is_best():
    assert best({"a": 2.0, "b": 1.0, "c": 1.0}) == "b"


def test_only_what_wins_somewhere_is_in_the_legend():
    cells = [[{"local": 2.0, "backprop": 1.0, "mixed": 1.5}]]
    text = draw_map("t", [Panel("p", cells)], ("up", ["1"]), ("right", ["x"]), "time").file()
    assert ">backprop</text>" in text
    assert ">local</text>" not in text
    assert "<title>local: 2.00, backprop: 1.00, mixed: 1.50</title>" in text
    assert "up: up; to the right: right" in text


def test_panels_lie_beside_each_other():
    panels = [Panel(name, [[{"a": 1.0}, {"a": 1.0}]]) for name in ("left", "right")]
    text = draw_map("t", panels, ("up", ["1"]), ("right", ["x", "y"]), "time", width=300).file()
    at = [float(x) for x in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="[\d.]+" h', text)]
    cells = at[2:]  # after the card and the legend
    wide = (300 - 54 - 14 - 16) / 2 / 2
    assert cells == pytest.approx([54.5, 54.5 + wide, 70.5 + 2 * wide, 70.5 + 3 * wide], abs=0.01)
