"""Maps of what is best."""

import re

from ds_local.charts.maps import Panel, draw_map
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
