"""From how many tokens a scheme learns as much as backpropagation."""

import pytest

from ds_local.cluster import learning
from ds_local.cluster.candidates import HEADS, PLANNED, TAILS
from ds_local.cluster.learning import Measured, learning_of

ROWS_KNOWN = (
    Measured("local", {}, 2, 8.0, 1, 1.1),
    Measured("local", {}, 4, 8.0, 3, 1.3),
    Measured("local", {}, 4, 64.0, 1, 2.0),
    Measured("local", {"readout": "shared"}, 4, 8.0, 1, 1.56),
    Measured("local", {"rank": 16}, 4, 8.0, 1, None),
    Measured("chunked 2", {}, 4, 8.0, 3, 1.2),
    Measured("chunked 2", {"blocks": 1}, 4, 8.0, 1, 1.25),
    Measured("interlocking 2", {}, 4, 8.0, 1, None),
    Measured("chunked 2", {}, 4, 8.0, 3, 1.1, tail=0.4),
    Measured("chunked 2", {"blocks": 1}, 4, 8.0, 1, 1.12, tail=0.4),
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(learning, "measured", lambda: ROWS_KNOWN)


@pytest.mark.parametrize(
    ("scheme", "head", "stages", "ratio", "tokens"),
    [
        ("backprop", {}, 16, 8, 1.0),
        ("backprop, split 2", {}, 16, 8, 1.0),
        ("data parallel", {}, 1, 8, 1.0),
        ("local", {}, 2, 8, 1.1),
        ("local", {}, 16, 8, 1.3),  # the most segments that were measured
        ("local", {}, 4, 50, 2.0),  # the nearest ratio
        ("chunked 2, split 2", {}, 8, 8, 1.2),
        ("local", {"readout": "shared"}, 4, 8, 1.56),
        ("local", {"readout": "shared"}, 2, 8, 1.56),  # what was measured, on more segments
        ("chunked 2", {"readout": "shared"}, 4, 8, 1.2 * 1.56 / 1.3),  # as it cost local learning
        ("chunked 2", {"blocks": 1}, 4, 8, 1.25),
        ("local", {"rank": 16}, 4, 8, None),
        ("chunked 2", {"rank": 8}, 4, 8, None),
        ("interlocking 2", {}, 4, 8, None),
        ("overlapping 2", {}, 4, 8, None),
    ],
)
def test_the_nearest_row_says_it(scheme, head, stages, ratio, tokens):
    found = learning_of(scheme, head, stages, ratio)
    assert found.tokens == (None if tokens is None else pytest.approx(tokens))


@pytest.mark.parametrize(
    ("scheme", "head", "tail", "tokens"),
    [
        ("chunked 2, split 2", {}, 0.4, 1.1),
        ("chunked 2", {"blocks": 1}, 0.4, 1.12),
        ("chunked 2", {"readout": "shared"}, 0.4, 1.1 * 1.56 / 1.3),  # as it cost without a tail
        ("chunked 2", {}, 0.2, None),  # another tail is another run
        ("local", {}, 0.4, None),
    ],
)
def test_a_tail_has_rows_of_its_own(scheme, head, tail, tokens):
    found = learning_of(scheme, head, 4, 8, tail=tail)
    assert found.tokens == (None if tokens is None else pytest.approx(tokens))


def test_a_tail_on_more_segments_costs_what_they_cost_without_one(monkeypatch):
    more = Measured("chunked 2", {}, 8, 8.0, 1, 1.5)
    fewer = Measured("chunked 2", {}, 2, 8.0, 1, 1.05)
    monkeypatch.setattr(learning, "measured", lambda: (*ROWS_KNOWN, more, fewer))
    found = {stages: learning_of("chunked 2", {}, stages, 8, tail=0.4) for stages in (2, 4, 8)}
    assert found[2].tokens == found[4].tokens == 1.1
    assert found[8].tokens == pytest.approx(1.1 * 1.5 / 1.2)
    assert "times 1.25 for more segments" in found[8].source


def test_the_source_names_the_row():
    text = learning_of("chunked 2, split 2", {"readout": "shared"}, 8, 8).source
    assert text == (
        "chunked 2 on 4 segments (vocabulary / width 8, 3 seeds); times 1.20 for the head, of "
        "local on 4 segments (vocabulary / width 8, 1 seed)"
    )
    assert "with a tail of 40%" in learning_of("chunked 2", {}, 4, 8, tail=0.4).source
    assert learning_of("interlocking 2", {}, 4, 8).source.endswith("above every run of backprop")
    assert learning_of("overlapping 2", {}, 4, 8).source.endswith("not measured")


def test_a_row_of_exactly_this_run_is_taken_as_it_is(monkeypatch):
    """Its full head was measured at another vocabulary / width, so the two are not divided."""
    eighth = {"vocabulary": 0.125}
    rows = (
        Measured("local", {}, 4, 8.0, 1, 1.2, tail=0.4),
        Measured("local", {}, 4, 8.0, 3, 1.3),
        Measured("local", {}, 8, 8.0, 1, 1.56),
        Measured("local", eighth, 4, 64.0, 1, 1.7),
        Measured("local", eighth, 4, 64.0, 1, 1.1, tail=0.4),
        Measured("chunked 2", {}, 4, 8.0, 1, 1.2),
    )
    monkeypatch.setattr(learning, "measured", lambda: rows)
    found = learning_of("local", eighth, 4, 65, tail=0.4)
    assert found.tokens == 1.1
    assert found.source == (
        "local with this head and a tail of 40% on 4 segments (vocabulary / width 64, 1 seed)"
    )
    more = learning_of("local", eighth, 8, 65, tail=0.4)
    assert more.tokens == pytest.approx(1.1 * 1.56 / 1.3)
    assert "times 1.20 for more segments" in more.source
    unknown = learning_of("chunked 2", eighth, 4, 65)
    assert unknown.tokens is None
    assert unknown.source == "local with full heads at vocabulary / width 64: not measured"


@pytest.mark.parametrize(
    ("scheme", "head", "ratio", "far"),
    [
        ("local", {}, 15, False),  # the row of 8, as near as that of 64 on a scale of factors
        ("local", {}, 130, True),
        ("chunked 2", {}, 65, True),
        ("chunked 2", {}, 16, False),
        ("chunked 2", {"readout": "shared"}, 3.9, True),
        ("backprop", {}, 1000, False),  # exact at any
    ],
)
def test_rows_unlike_the_model_are_known_as_such(scheme, head, ratio, far):
    assert learning_of(scheme, head, 4, ratio).far is far


def test_every_scheme_and_head_of_the_planner_is_looked_up(monkeypatch):
    monkeypatch.undo()
    found = {scheme: learning_of(scheme, {}, 4, 8.0).tokens for scheme in PLANNED}
    for scheme, _, share in TAILS.values():
        assert learning_of(scheme, {}, 4, 8.0, tail=share).tokens is not None
    assert found["chunked 2"] == found["chunked 2, split 2"] == pytest.approx(1.17, abs=0.01)
    assert found["local"] == pytest.approx(1.31, abs=0.01)
    assert learning_of("local", HEADS["shared"], 4, 8.0).tokens == pytest.approx(1.44, abs=0.01)


def test_older_gradients_need_a_row_of_gradients_no_younger(monkeypatch):
    name = "backprop, run ahead, predicted"
    rows = (Measured(name, {}, 4, 8.0, 1, 1.1, 0.375), Measured(name, {}, 4, 8.0, 3, 1.2, 0.75))
    monkeypatch.setattr(learning, "measured", lambda: rows)
    found = {delay: learning_of(name, {}, 4, 8.0, delay) for delay in (0.2, 0.375, 0.5, 0.75, 1.0)}
    assert [one.tokens for one in found.values()] == [1.1, 1.1, 1.2, 1.2, None]
    assert found[0.5].source.endswith("3 seeds), gradients up to 0.75 steps old, here 0.50")
    assert found[1.0].source == f"{name} with gradients 1.00 steps old: not measured"
