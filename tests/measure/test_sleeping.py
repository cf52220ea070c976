"""Stages whose compute is sleep."""

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
