"""Buffers that layers change as they run keep no trace of a step that is not finite."""

import copy

import torch
from torch import nn

from ds_local.engine.kept_buffers import KeptBuffers


def net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    layers.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    return layers


def test_running_statistics_become_what_they_were():
    layers = net()
    kept = KeptBuffers(layers)
    layers(torch.randn(8, 4))
    kept.mend()
    before = copy.deepcopy(layers.state_dict())
    for bad in (torch.nan, torch.inf):
        layers(torch.full((8, 4), bad))
        assert not layers[1].running_var.isfinite().all()
        kept.mend()
        for name in ("1.running_mean", "1.running_var"):
            assert torch.equal(layers.state_dict()[name], before[name]), name
    layers(torch.randn(8, 4))
    moved = layers[1].running_mean.clone()
    kept.mend()
    assert torch.equal(layers[1].running_mean, moved)
    assert not torch.equal(moved, before["1.running_mean"])


def test_the_first_step_counts_too_and_a_mask_may_hold_infinities():
    layers = net()
    kept = KeptBuffers(layers)
    layers(torch.full((8, 4), torch.nan))
    kept.mend()
    assert torch.equal(layers[1].running_mean, torch.zeros(4))
    assert torch.equal(layers.mask, net().mask)


def test_a_buffer_may_grow_and_others_be_loaded():
    layers = net()
    kept = KeptBuffers(layers)
    layers.mask = torch.zeros(3, 3)
    layers(torch.randn(8, 4))
    kept.mend()
    layers[1].running_mean.fill_(2.0)
    kept.keep()  # as after a load
    layers(torch.full((8, 4), torch.nan))
    kept.mend()
    assert torch.equal(layers[1].running_mean, torch.full((4,), 2.0))
