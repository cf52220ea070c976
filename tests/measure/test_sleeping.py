"""Stages whose compute is sleep."""

import pytest
import torch

from ds_local.measure import (
    sleeping,
)

QUICK = sleeping.Times(0.001, 0.001, 0.001)


def test_a_stage_splits_its_backward_pass():
    sleeping.EVENTS.clear()
    stage, x = sleeping.Stage(QUICK), torch.ones(1, 3, requires_grad=True)
    y = stage(x)
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert [what for what, *_ in sleeping.EVENTS] == ["forward", "input gradient"]
    y.sum().backward()
    assert sorted(what for what, *_ in sleeping.EVENTS[2:]) == ["input gradient", "weight gradient"]


def test_pieces_share_the_times_of_a_stage():
    times = sleeping.Times(0.4, 0.2, 0.1, layers=4, width=3)
    assert times.useful == pytest.approx(0.7)
    piece = sleeping.Stage(times, pieces=2)
    assert (piece.forward_seconds, piece.input_grad_seconds) == (0.2, 0.1)
    assert piece.weight_grad_seconds == 0.05
    assert sum(isinstance(layer, torch.nn.Linear) for layer in piece.layers) == 2


def test_a_head_sleeps_and_gives_a_loss():
    sleeping.EVENTS.clear()
    hidden = torch.full((2, 3), 2.0)
    assert sleeping.Head(0.0)(hidden, hidden).item() == 4.0
    assert sleeping.EVENTS == []
    sleeping.Head(0.001)(hidden, hidden)
    ((what, start, end),) = sleeping.EVENTS
    assert what == "head"
    assert end - start >= 0.001
