"""The charts of the quality study: what is compared, and where it lies."""

import re
from xml.etree import ElementTree

import pytest
from study_runs import run_of
from test_tables import rows_of

from ds_local.study.picture import COMPARED, LARGE, SMALL, compared, curves_chart, gaps_chart

LOSSES = {
    "backprop": [2.0, 2.1],
    "chunked 2": [2.05, 2.2],
    "local": [2.1, 2.2],
    "overlapping 2": [3.0],
}


@pytest.fixture(scope="module")
def rows():
    return rows_of(LOSSES)


def test_what_is_compared_is_in_its_order_and_of_its_setting(rows):
    assert list(compared(rows[::-1], SMALL)) == ["backprop", "chunked 2", "local"]
    assert compared(rows, LARGE) == {}
    assert compared([row | {"segments": 8} for row in rows], SMALL) == {}
    assert len(set(COMPARED)) == len(COMPARED)


def test_gaps_have_a_dot_for_each_method_and_its_spread(rows):
    text = gaps_chart(rows)
    ElementTree.fromstring(text)
    for name in ("backprop", "chunked 2", "local"):
        assert f">{name}</text>" in text
    assert "overlapping" not in text
    assert ">steps of 2,048 tokens, 3,000 of them</text>" in text


def test_curves_end_where_the_runs_do(rows):
    curve = [(1_000_000, 2.6), (2_000_000, 2.2), (3_000_000, 2.0)]
    results = [
        run_of(method, seed=seed)._asdict() | {"loss": 2.0, "curve": curve}
        for method in ("backprop", "chunked 2", "local")
        for seed in (1, 2)
    ]
    results[-1]["curve"] = curve[-1:]  # only its end was kept: the other seed is drawn alone
    text = curves_chart(results, rows)
    ElementTree.fromstring(text)
    assert "seed 1;" in text
    paths = re.findall(r'<path d="([^"]+)"', text)
    assert len(paths) == 6  # three curves against tokens, three against time
    assert all(path.count("L") == 1 for path in paths)  # the first point is above the chart
