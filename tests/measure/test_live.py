"""Saved tensors are counted once."""

import torch

from ds_local.measure.live import LiveTensors


def test_saved_tensors_are_counted_once_and_weights_never():
    linear, x = torch.nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    with LiveTensors() as live:
        y = linear(x)  # saves x: 2 x 4 floats
        assert live.now == 32
        z = y.exp() + linear(x)  # saves the result of exp, and x again
        assert live.now == 64
        z.sum().backward()
        assert live.now == 0
    assert live.peak == 64
