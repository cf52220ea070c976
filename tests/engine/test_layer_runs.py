"""Layers that are computed again give what they gave, and the same gradients."""

import pytest
import torch
from torch import nn

from ds_local.engine.layer_runs import run_layers


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(3)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_recomputing_changes_nothing(interval):
    layers = [nn.Linear(4, 4), InPlace(), nn.Linear(4, 2), nn.Tanh()]
    found = []
    for every in (0, interval):
        x = torch.ones(3, 4, requires_grad=True)
        out = run_layers(layers, x * 1, every)
        out.sum().backward()
        found.append((out, x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_layers_are_called_again_only_for_gradients():
    calls = []
    layers = [lambda x: calls.append(1) or x.tanh()]
    x = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        run_layers(layers, x, 1)
    assert len(calls) == 1
    run_layers(layers, x, 1).backward()
    assert len(calls) == 3


def test_no_layer_hands_on_what_it_is_given():
    assert run_layers([], "inputs", 2) == run_layers([], "inputs") == "inputs"
