"""A schedule as data: who is alive, what is sent and received."""

from schedule_rows import schedule_of

from ds_local.schedules.schedule import (
    FORWARD,
    INPUT_GRADIENT,
    Action,
    Link,
)


def test_live_micro_batches():
    assert schedule_of(("local", None, 8), stages=4).peak_live == (1, 1, 1, 1)
    assert schedule_of(("backprop", None, 8), stages=4).peak_live == (4, 3, 2, 1)
    assert max(schedule_of(("interlocking", 3, 8), stages=8).peak_live) == 3
    assert [
        schedule_of(("backprop", None, g), ("local", None, 8 - g), stages=4).peak_live[0]
        for g in (1, 2, 4)
    ] == [2, 3, 5]
    # with more backprop micro-batches than stages, the bound of 1F1B holds: 4 of them and one local
    # one
    assert schedule_of(("backprop", None, 8), ("local", None, 8), stages=4).peak_live[0] == 5


def test_a_message_read_by_two_passes_is_received_once():
    schedule = schedule_of(("overlapping", 3, 2), stages=4)
    received = [
        (a.segment, a.micro_batch, loss)
        for a in schedule.actions()
        if a.kind != FORWARD
        for loss in schedule.received(a)
    ]
    assert len(received) == len(set(received))
    assert (1, 0, 2) in received


def test_gradients_of_each_loss_distance_have_a_link_of_their_own():
    links = {
        schedule_link
        for a in schedule_of(("interlocking", 3, 2), stages=6).actions()
        if (schedule_link := _sends(a))
    }
    assert {link for link in links if link.lower == 1 and link.kind == "gradient"} == {
        Link("gradient", 1, 1),
        Link("gradient", 1, 2),
    }


def _sends(action):
    return schedule_of(("interlocking", 3, 2), stages=6).sends(action)


def test_an_action_prints_as_kind_and_micro_batch():
    assert str(Action(INPUT_GRADIENT, 2, 7)) == "I7"
