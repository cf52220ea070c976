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


class Counting(nn.Module):
    """Multiplies by the number of calls, which it keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls.clone()


def test_what_is_computed_again_reads_the_buffers_of_the_first_time():
    layer = Counting()
    x = torch.ones(1, requires_grad=True)
    first, second = (run_layers([layer], x, 1) for _ in range(2))
    for out, factor in ((first, 1.0), (second, 2.0)):
        for keep in (True, False):  # two passes over one micro-batch
            assert torch.autograd.grad(out, x, retain_graph=keep)[0] == factor
    assert layer.calls == 2
