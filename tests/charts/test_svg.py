"""A drawing as SVG text: attributes, escapes, parts of parts."""

from xml.etree import ElementTree

from ds_local.charts.svg import Svg, text_width


def test_numbers_are_short_and_names_are_those_of_svg():
    svg = Svg(10, 20, "what is seen")
    svg.add("circle", cx=1.0, cy=2.346, r=0.5, cls="card", stroke_width=None)
    svg.line(0, 1, 2, 3)
    assert svg.inline() == (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 20" role="img" '
        'aria-label="what is seen"><circle cx="1" cy="2.35" r="0.5" class="card"/>'
        '<line x1="0" y1="1" x2="2" y2="3" class="rule"/></svg>'
    )


def test_text_cannot_end_its_element():
    svg = Svg(10, 10, 'a "b" <c>')
    svg.text(0, 0, "<script> & more", anchor="end")
    svg.rect(0, 0, -3, 4, tip="1 < 2")
    root = ElementTree.fromstring(svg.inline())
    text, rect = root
    assert root.attrib["aria-label"] == 'a "b" <c>'
    assert (text.text, text.attrib["text-anchor"]) == ("<script> & more", "end")
    assert (rect[0].text, rect.attrib["width"]) == ("1 < 2", "0")


def test_a_part_moves_and_makes_room():
    whole, part = Svg(100, 50, "whole"), Svg(30, 40, "part")
    part.line(0, 0, 1, 1)
    whole.embed(part, 5, 20.5)
    assert whole.height == 60.5
    assert '<g transform="translate(5 20.5)"><line x1="0"' in whole.inline()
    whole.embed(part, 0, 0)
    assert whole.height == 60.5


def test_a_file_has_style_and_card_below_the_drawing():
    svg = Svg(100, 50, "it")
    svg.line(0, 0, 1, 1)
    root = ElementTree.fromstring(svg.file())
    assert [child.tag.rpartition("}")[2] for child in root] == ["style", "rect", "line"]
    assert (root.attrib["width"], root.attrib["height"]) == ("100", "50")
    assert root[1].attrib["width"] == "99"
    assert "<style>" not in svg.inline()


def test_width_grows_with_length_and_size():
    assert text_width("abcd", 10) == 0.56 * 40
    assert text_width("") == 0
