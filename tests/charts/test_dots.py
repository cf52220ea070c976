"""Rows of dots and bars."""

import re
from xml.etree import ElementTree

from ds_local.charts.dots import Dot, DotPanel, draw_dots
from ds_local.charts.style import SERIES

CIRCLE = r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5" fill="([^"]+)"'


def test_a_dot_lies_where_its_value_is_and_its_line_over_the_spread():
    rows = [[Dot(0.0)], [Dot(5.0, 2.5, 10.0)]]
    text = draw_dots("found", ["local", "chunked 2"], [DotPanel("gap", rows)]).file()
    ElementTree.fromstring(text)
    (x0, y0, color0), (x1, y1, color1) = re.findall(CIRCLE, text)
    assert (color0, color1) == (SERIES[2], SERIES[1])
    assert float(y1) - float(y0) == 26
    low, high = map(float, ends(text, y1))
    unit = (float(x1) - float(x0)) / 5
    assert round((low - float(x0)) / unit, 2) == 2.5
    assert round((high - float(x0)) / unit, 2) == 10.0


def ends(text, y):
    return re.search(
        rf'<line x1="([\d.]+)" y1="{y}" x2="([\d.]+)" y2="{y}" stroke="#', text
    ).groups()


def test_two_kinds_in_a_row_do_not_hide_each_other():
    panel = DotPanel("gap", [[Dot(1.0), Dot(1.0, ring=True)], [Dot(2.0)]], mark=(3.0, "1F1B"))
    text = draw_dots("found", ["local", "mixed 1/4"], [panel], ("small", "large")).file()
    heights = [float(y) for _, y, _ in re.findall(CIRCLE, text)]
    assert heights == [84.0, 94.0, 115.0]
    assert "1F1B" in text


def test_bars_begin_at_zero_and_say_their_value():
    panel = DotPanel("MiB", [[Dot(10.0)], [Dot(40.0)]], bars=True)
    text = draw_dots("found", ["a", "b"], [panel]).file()
    wide = re.findall(r'width="([\d.]+)" height="16"', text)
    assert round(float(wide[1]) / float(wide[0]), 2) == 4
    assert ">40</text>" in text


def test_panels_can_share_a_scale():
    panels = [DotPanel(str(n), [[Dot(10.0 * n)]], bars=True, end=40.0) for n in (1, 4)]
    text = draw_dots("found", ["a"], panels).file()
    wide = re.findall(r'width="([\d.]+)" height="16"', text)
    assert round(float(wide[1]) / float(wide[0]), 2) == 4
