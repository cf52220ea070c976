"""Colours: one for each scheme, whatever the picture."""

from ds_local.charts.style import colors_of


def test_a_scheme_has_one_colour_and_no_two_have_the_same():
    few, many = colors_of(["local", "chunked 2"]), colors_of(["chunked 2", "backprop", "local"])
    assert all(many[name] == color for name, color in few.items())
    several = colors_of(["local", "local, head 5 %", "torch ZBV", "unknown"])
    assert len(set(several.values())) == 4
