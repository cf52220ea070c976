"""The device that benchmarks run on, as a CPU."""

import torch
from reference import GPT2
from torch import nn

from ds_local.measure.device import WARM_UP, Device, Layers
from ds_local.model import families


def test_the_median_of_the_runs_after_the_warm_up(monkeypatch):
    times = iter([0, 9, 0, 9, 0, 9, 0, 1, 0, 5, 0, 2])  # three of warm-up; then 1, 5 and 2
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    runs = []
    assert Device("cpu", 3).seconds(lambda: runs.append(1)) == 2
    assert len(runs) == WARM_UP + 3


def test_a_cpu_knows_no_peak():
    device = Device("cpu", 1)
    device.forget_peak()
    assert device.peak() is None


def test_layers_run_one_after_another():
    double = nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    assert Layers([double, nn.ReLU(), double])(torch.ones(1)).item() == 4.0


def test_blocks_have_the_same_weights_but_not_the_same_memory():
    config, device = families.load_model_config(GPT2), Device("cpu", 1)
    first, second = device.blocks(config, 2)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.bfloat16
        assert one.data_ptr() != other.data_ptr()
    ids = device.ids(config, 3, 5)
    assert ids.shape == (3, 5)
    assert 0 <= ids.min() <= ids.max() < config.vocab_size
    assert device.ready(nn.Linear(2, 2).eval()).training
