"""Colours: one for each scheme, whatever the picture."""

import re

from ds_local.charts.style import (
    CSS,
    KINDS,
    SERIES,
    color_of,
    color_of_kind,
    colors_of,
    page_variables,
)


def test_a_scheme_has_one_colour_and_no_two_have_the_same():
    few, many = colors_of(["local", "chunked 2"]), colors_of(["chunked 2", "backprop", "local"])
    assert all(many[name] == color for name, color in few.items())
    several = colors_of(["local", "local, head 5 %", "torch ZBV", "unknown"])
    assert len(set(several.values())) == 4


def test_many_series_are_a_scale_from_blue_to_orange():
    assert [color_of(n, 8) for n in range(8)] == list(SERIES)
    scale = [color_of(n, 9) for n in range(9)]
    assert (scale[0], scale[-1]) == ("hsl(215 62% 55%)", "hsl(390 62% 55%)")
    assert len(set(scale)) == 9


def test_a_kind_of_scheme_keeps_its_colour():
    assert color_of_kind("chunked 2, split 2") == color_of_kind("chunked") == SERIES[1]
    assert color_of_kind("local, head 5 %") == SERIES[2]
    assert color_of_kind("") == color_of_kind("unknown") == SERIES[5]


def test_light_and_dark_name_the_same_colours():
    light, dark = page_variables().split("@media")
    names = [set(re.findall(r"--(\w+):", part)) for part in (light, dark)]
    assert names[0] == names[1] == {"card", "edge", "track", "ink", "faint", "page"}
    assert CSS.count(".card{fill:") == 2
    for kind, (_, color, ink) in KINDS.items():
        assert f".{kind}{{fill:{color}}}.on{kind}{{fill:{ink}}}" in CSS
