"""Earlier weights for micro-batches that run ahead: one number for the weights, worked out by
hand."""

import pytest
import torch
from torch import nn

from ds_local.engine.stash import Stash, Used, stash_file
from ds_local.errors import CheckpointError
from ds_local.schedules.routes import make_routes
from ds_local.schedules.run_ahead import make_run_ahead

# two segments, two micro-batches a step: segment 0 is one forward ahead
SCHEDULE = make_run_ahead([(make_routes("backprop", 2), 2)], 1)


def made():
    weight = nn.Parameter(torch.tensor([1.0]))
    return Stash({0: [weight]}), weight


def test_the_lead_is_one_forward():
    assert SCHEDULE.leads == (1, 0)


def test_only_what_goes_ahead_of_an_update_needs_a_copy():
    stash, weight = made()
    assert stash.forward(0, 0, 0) is None  # no stretch has begun
    stash.begin(0, SCHEDULE, predicts=False)
    assert [stash.forward(0, 0, m) for m in (0, 1)] == [None, None]
    ahead = stash.forward(0, 1, 0)
    assert ahead == Used(0, 0)
    weight.data.fill_(2.0)  # the update
    stash.begin(1, SCHEDULE, predicts=False)
    with stash.weights(0, ahead):
        assert weight.item() == 1.0
    assert weight.item() == 2.0
    with stash.weights(0, None):
        assert weight.item() == 2.0
    assert stash.forward(0, 1, 1) is None


def test_weights_come_back_after_an_error():
    stash, weight = made()
    stash.begin(0, SCHEDULE, predicts=False)
    for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
        used = stash.forward(0, step, micro_batch)
    weight.data.fill_(2.0)
    with pytest.raises(ZeroDivisionError), stash.weights(0, used):
        raise ZeroDivisionError
    assert weight.item() == 2.0


def test_a_copy_is_let_go_when_nobody_needs_it():
    stash, weight = made()
    stash.begin(0, SCHEDULE, predicts=False)
    for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
        used = stash.forward(0, step, micro_batch)
    stash.begin(1, SCHEDULE, predicts=False)
    stash.forward(0, 1, 1)
    stash.let_go(0, [used])
    with stash.weights(0, used):
        assert weight.item() == 1.0
    stash.let_go(0, [])
    with pytest.raises(KeyError), stash.weights(0, used):
        pass


def test_a_prediction_adds_the_last_update_once_more():
    stash, weight = made()
    stash.begin(0, SCHEDULE, predicts=True)
    first = [stash.forward(0, *at) for at in ((0, 0), (0, 1), (1, 0))]
    assert first == [None, None, Used(0, 1)]  # before the first update nothing can be predicted
    stash.before_update()
    weight.data.fill_(1.5)
    stash.begin(1, SCHEDULE, predicts=True)
    stash.forward(0, 1, 1)
    ahead = stash.forward(0, 2, 0)
    assert ahead == Used(1, 1)
    for used, value in ((first[-1], 1.0), (ahead, 1.5 + 0.5)):
        with stash.weights(0, used):
            assert weight.item() == value


def test_what_is_on_the_way_to_a_segment():
    stash, _ = made()
    stash.begin(3, SCHEDULE, predicts=False)
    stash.begin(4, SCHEDULE, predicts=False)
    assert list(stash.on_the_way(1, None)) == [(5, 0)]
    assert list(stash.on_the_way(1, 4)) == []  # the last step: nothing has run ahead of it
    assert list(stash.on_the_way(0, None)) == []


def test_a_file_brings_the_copies_back(tmp_path):
    stash, _ = made()
    stash.begin(0, SCHEDULE, predicts=False)
    for at in ((0, 0), (0, 1), (1, 0)):
        used = stash.forward(0, *at)
    stash.save(torch.save, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [stash_file(0)]
    other, there = made()
    there.data.fill_(9.0)
    look, files = (lambda name: torch.load(tmp_path / name)), [stash_file(0)]
    other.load(look, files, SCHEDULE)
    assert other.start == 0
    with other.weights(0, used):
        assert there.item() == 1.0
    longer = make_run_ahead([(make_routes("backprop", 2), 4)], 1)
    other.load(look, files, longer)  # of another run: begun afresh
    assert other.start is None
    other.load(look, [], SCHEDULE)  # there is none
    assert other.start is None


def test_a_file_of_something_else_is_refused(tmp_path):
    stash, _ = made()
    name = stash_file(0)
    good = {"start": 0, "weights": {(0, 0): [torch.ones(1)]}, "leads": [1, 0], "micro_batches": 2}
    assert stash.check(lambda _: good, [name], SCHEDULE)
    assert not stash.check(lambda _: good | {"micro_batches": 4}, [name], SCHEDULE)
    assert not stash.check(lambda _: good, [], SCHEDULE)
    for bad in ({}, good | {"start": None}, good | {"weights": {(0, 0): [torch.ones(2)]}}):
        with pytest.raises(CheckpointError, match=f"{name} is not what segment 0 keeps"):
            stash.check(lambda _, bad=bad: bad, [name], SCHEDULE)


def test_at_the_end_of_a_stretch_nothing_is_kept():
    stash, _ = made()
    stash.begin(0, SCHEDULE, predicts=False)
    assert stash.under_way
    stash.end()
    assert (stash.start, stash.under_way) == (None, False)
    assert stash.forward(0, 0, 0) is None
