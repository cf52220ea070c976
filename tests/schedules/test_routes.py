"""The table itself, and what follows from it. What it means for gradients is tested in
dist/test_rows.py."""

import pytest

from ds_local.errors import RouteError
from ds_local.schedules.routes import MODES, corrected, make_routes


def trains(routes):
    """loss -> the segments it trains."""
    return {loss: sorted(row) for loss, row in routes.weights.items()}


@pytest.mark.parametrize(
    ("mode", "window", "expected"),
    [
        ("backprop", None, {3: [0, 1, 2, 3]}),
        ("local", None, {0: [0], 1: [1], 2: [2], 3: [3]}),
        ("chunked", 2, {1: [0, 1], 3: [2, 3]}),
        ("chunked", 3, {2: [0, 1, 2], 3: [3]}),
        ("overlapping", 2, {0: [0], 1: [0, 1], 2: [1, 2], 3: [2, 3]}),
        ("interlocking", 2, {1: [0], 2: [1], 3: [2, 3]}),
        ("interlocking", 3, {2: [0], 3: [1, 2, 3]}),
        ("deep_supervision", None, {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3]}),
    ],
)
def test_rows_of_four_segments(mode, window, expected):
    assert trains(make_routes(mode, 4, window)) == expected


def test_shifted_chunks_move_by_one_segment_a_step():
    steps = [trains(make_routes("shifted_chunked", 4, 2, step=step)) for step in range(3)]
    assert steps == [{1: [0, 1], 3: [2, 3]}, {0: [0], 2: [1, 2], 3: [3]}, {1: [0, 1], 3: [2, 3]}]


@pytest.mark.parametrize("num_segments", [1, 2, 3, 4, 7])
def test_limits_agree(num_segments):
    def table(mode, window=None):
        routes = make_routes(mode, num_segments, window)
        return routes.weights, routes.passes

    assert (
        table("interlocking", num_segments) == table("backprop") == table("chunked", num_segments)
    )
    assert (
        table("interlocking", 1) == table("chunked", 1) == table("local") == table("overlapping", 1)
    )
    only_last = make_routes(
        "deep_supervision", num_segments, weights=[0.0] * (num_segments - 1) + [1.0]
    )
    assert (only_last.weights, only_last.passes) == table("backprop")


def test_interlocking_builds_only_heads_that_supervise_somebody():
    assert make_routes("interlocking", 4, 2).losses == (1, 2, 3)
    assert make_routes("interlocking", 4, 3).losses == (2, 3)
    assert make_routes("backprop", 4).losses == (3,)


def test_interlocking_sends_one_message_per_loss_distance_and_no_weight_gradients_in_between():
    routes = make_routes("interlocking", 6, 3)
    # segment 2 hands the gradients of losses 2 and 3 on, and learns from loss 4 alone
    assert [(p.reads, p.weights, p.sends) for p in routes.passes[2]] == [
        (((2, 1.0),), False, 2),
        (((3, 1.0),), False, 3),
        (((4, 1.0),), True, None),
    ]
    assert routes.messages(2) == (2, 3)
    assert routes.reach[2] == 2


def test_overlapping_sends_only_its_own_loss_and_learns_from_the_sum():
    middle = make_routes("overlapping", 4, 2).passes[1]
    assert [(p.reads, p.weights, p.sends) for p in middle] == [
        (((1, 1.0),), False, 1),
        (((1, 1.0), (2, 1.0)), True, None),
    ]


def test_overlapping_mean_weighs_each_segment_by_the_losses_it_hears():
    routes = make_routes("overlapping", 4, 3, "mean")
    assert routes.weights[3] == {1: pytest.approx(1 / 3), 2: 0.5, 3: 1.0}
    assert sum(row.get(1, 0) for row in routes.weights.values()) == pytest.approx(1.0)


def test_deep_supervision_needs_one_pass_and_one_message_whatever_the_depth():
    routes = make_routes("deep_supervision", 5, weights=[0.1, 0.2, 0.3, 0.4, 1.0])
    assert all(len(passes) == 1 and passes[0].weights for passes in routes.passes)
    assert [len(routes.messages(s)) for s in range(5)] == [0, 1, 1, 1, 1]
    assert routes.loss_weights == {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 1.0}


def test_corrected_table_takes_off_what_the_rest_give():
    """Two of eight micro-batches: theirs counts 4 times, and what the rest learn from is taken off
    3 times."""
    backprop, local = make_routes("backprop", 3), make_routes("local", 3)
    assert corrected(backprop, local, 4.0, 1.0).weights == {
        0: {0: -3.0},
        1: {1: -3.0},
        2: {0: 4.0, 1: 4.0, 2: 1.0},
    }
    assert corrected(backprop, local, 4.0, 0.5).weights == {
        0: {0: -1.5},
        1: {1: -1.5},
        2: {0: 2.5, 1: 2.5, 2: 1.0},
    }
    assert corrected(backprop, local, 4.0, 0.0).weights == backprop.weights
    # segment 1 hands on the true gradient alone
    assert [
        (p.reads, p.weights, p.sends) for p in corrected(backprop, local, 4.0, 1.0).passes[1]
    ] == [
        (((2, 1.0),), False, 2),
        (((1, -3.0), (2, 4.0)), True, None),
    ]


def test_correcting_chunks_costs_no_pass_where_there_are_two():
    chunks = corrected(make_routes("backprop", 4), make_routes("chunked", 4, 2), 2.0, 1.0)
    assert chunks.weights == {1: {0: -1.0, 1: -1.0}, 3: {0: 2.0, 1: 2.0, 2: 1.0, 3: 1.0}}
    assert [len(passes) for passes in chunks.passes] == [1, 1, 1, 1]


def test_a_loss_with_a_weight_cannot_be_taken_off():
    with pytest.raises(RouteError, match="leave weights out of the mix"):
        corrected(
            make_routes("backprop", 2),
            make_routes("deep_supervision", 2, weights=[0.5, 1.0]),
            2.0,
            1.0,
        )


def test_print_shows_the_table():
    assert str(make_routes("interlocking", 4, 2)).splitlines() == [
        "interlocking(2), 4 segments",
        "segment      0    1    2    3",
        "loss 1       1    .    .    .",
        "loss 2       .    1    .    .",
        "loss 3       .    .    1    1",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "greedy"}, "unknown; use one of"),
        ({"mode": "local", "window": 2}, "takes no window"),
        ({"mode": "interlocking", "window": 5}, "window is 5 but the model has 4 segments"),
        ({"mode": "chunked", "window": 0}, "choose 1 to 4"),
        ({"mode": "interlocking", "combine": "mean"}, 'or, for mode "overlapping"'),
        ({"mode": "local", "weights": [1, 1, 1, 1]}, "leave them out"),
        ({"mode": "deep_supervision", "weights": [1, 1]}, "has 2 entries"),
        ({"mode": "deep_supervision", "weights": [1, 1, 1, 0]}, "the readout never learns"),
        ({"mode": "deep_supervision", "weights": [float("nan"), 1, 1, 1]}, "must be finite"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(arguments, words):
    with pytest.raises(RouteError, match=None) as error:
        make_routes(num_segments=4, **arguments)
    assert words in str(error.value)


def test_every_mode_trains_every_segment():
    for mode in MODES:
        for num_segments in (1, 2, 5, 8):
            routes = make_routes(mode, num_segments)
            assert all(any(p.weights for p in passes) for passes in routes.passes), (
                mode,
                num_segments,
            )
