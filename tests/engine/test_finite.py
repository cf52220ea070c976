"""What a segment suffers from, judged from what was seen of it."""

import logging

import pytest
import torch

from ds_local.engine.finite import (
    ABOVE,
    BELOW,
    KINDS,
    LOSS,
    OUTPUT,
    SENT,
    WEIGHTS,
    Events,
    Watch,
    state_in,
)
from ds_local.errors import NonFiniteError

NAN, INF = float("nan"), float("inf")
ALL = {BELOW: 0, OUTPUT: 0, LOSS: 0, ABOVE: 0, SENT: 0}


def judged(segment, *bad, weights=0.0, value=NAN):
    """Of a segment with two micro-batches, where `bad` are (what, micro-batch)."""
    watch = Watch()
    for micro_batch in range(2):
        for what in ALL:
            number = torch.full((2, 3), value if (what, micro_batch) in bad else 1.0)
            watch.see(what, segment, [number], micro_batch)
    watch.see(WEIGHTS, segment, [torch.tensor(weights)])
    return watch.judge(watch.flags(torch.device("cpu")).tolist()).get(segment)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("bad", "weights", "kind"),
    [
        ([], 0.0, None),
        ([], NAN, "gradient"),
        ([(LOSS, 0)], 0.0, "loss"),
        ([(LOSS, 1), (SENT, 1)], NAN, "loss"),
        ([(OUTPUT, 1), (LOSS, 1), (SENT, 1)], NAN, "activation"),
        ([(OUTPUT, 1), (ABOVE, 1), (SENT, 1)], NAN, "activation"),  # it comes back
        ([(SENT, 0)], 0.0, "gradient"),
        ([(ABOVE, 0), (SENT, 0)], NAN, "from_above"),
        ([(ABOVE, 0), (SENT, 0)], 0.0, None),  # passed on by layers without weights
        ([(BELOW, 0), (OUTPUT, 0), (LOSS, 0), (SENT, 0)], NAN, "from_below"),
        ([(BELOW, 0), (OUTPUT, 0)], 0.0, None),  # of a micro-batch that does not train it
        ([(BELOW, 0), (OUTPUT, 0), (LOSS, 1)], NAN, "loss"),  # its own too, elsewhere
        ([(ABOVE, 0), (LOSS, 0)], NAN, "loss"),
    ],
)
def test_the_first_cause_counts(bad, weights, kind, value):
    assert judged(1, *bad, weights=weights, value=value) == kind


def test_the_first_segment_blames_the_batch():
    assert judged(0, (BELOW, 0), (OUTPUT, 0), (LOSS, 0), weights=NAN) == "batch"


def test_one_replicas_number_counts_for_all():
    watch = Watch()
    watch.see(LOSS, 0, [torch.tensor(1.0)], 0)
    assert watch.judge([1.0]) == {0: "loss"}  # the flag of another replica, added up
    assert watch.judge([0.0]) == {}


def test_masks_may_hold_infinity_and_gradients_flow_elsewhere():
    mask = torch.tensor([0.0, -INF])
    hidden = torch.ones(2, requires_grad=True)
    watch = Watch()
    watch.see(OUTPUT, 0, state_in([mask, hidden], [hidden]), 0)
    watch.see(OUTPUT, 0, state_in([mask, torch.empty(0)], []), 1)
    watch.see(OUTPUT, 0, state_in([], []), 1)
    assert watch.flags(torch.device("cpu")).tolist() == [0.0, 0.0]
    watch.see(OUTPUT, 0, state_in([torch.tensor([NAN, 0.0])], []), 2)
    watch.see(OUTPUT, 0, state_in([mask, hidden * -INF], [hidden * -INF]), 3)
    assert watch.flags(torch.device("cpu")).tolist()[2:] == [1.0, 1.0]


@pytest.mark.parametrize(("kind", "ends_after"), [("loss", 3), ("from_above", 4)])
def test_who_only_got_it_from_a_neighbour_waits_a_step(kind, ends_after):
    events = Events(3, 2, None, speaks=False)
    for step in range(1, ends_after):
        events.book(step, {2: kind}, step)
        events.check()
    events.book(ends_after, {2: kind}, ends_after)
    with pytest.raises(NonFiniteError, match=rf"step {ends_after} on stage 2, the {ends_after}"):
        events.check()


def test_a_good_step_starts_the_count_again():
    events = Events(2, 0, None, speaks=False)
    for step, kinds in enumerate([{0: "loss"}, {}, {0: "loss"}, {1: "loss"}, {0: "loss"}], 1):
        events.book(step, kinds, step)
        events.check()
    assert events.newest == {0: ("loss", 5), 1: ("loss", 4)}


def test_a_run_that_never_ends_does_not_fill_the_console(caplog):
    events = Events(10**9, 0, None, speaks=True)
    with caplog.at_level(logging.WARNING, "ds_local"):
        for step in range(1, 301):
            events.book(step, {0: KINDS[step % 4]}, step)
    assert len(caplog.messages) == 10 + 3
    assert "the 300th on this stage" in caplog.messages[-1]
