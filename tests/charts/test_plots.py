"""Curves and bars lie where their values are."""

from ds_local.charts.plots import Curve, chart, ticks


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
