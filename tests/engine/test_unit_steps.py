"""What a replica that is a job of its own gives to the mean of a step, and takes from it."""

from types import SimpleNamespace

import pytest
import torch
from standin import standin
from torch import nn

from ds_local.engine.unit_links import WholePipeline
from ds_local.engine.unit_steps import UnitSteps
from ds_local.links.device import to_device
from ds_local.replicas.elastic import Mean

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


class Group:
    """One other replica, which has the same."""

    def average(self, step, numbers, size):
        assert numbers.shape == (size,)
        self.mean = Mean(step, numbers.clone(), 2)
        return self.mean


def stage(device):
    """Two segments: one with a gradient, a loss of 3 and a weight of 2; one that has neither."""
    weights = [nn.Parameter(to_device(torch.ones(2, 3), device)) for _ in range(2)]
    weights[0].grad = to_device(torch.arange(6.0).view(2, 3), device)
    made = SimpleNamespace(
        executor=SimpleNamespace(
            step=4, stop_after=4, counted={0: (2.0, 1)}, losses={0: weights[0].grad.sum() / 5}
        ),
        module=SimpleNamespace(local_segments=[0, 1]),
        units=WholePipeline(),
        device=device,
        _weights={segment: [weight] for segment, weight in enumerate(weights)},
        _others_mean=None,
    )
    made._size_of_mean = UnitSteps._size_of_mean.fget(made)
    return made, weights


@pytest.fixture(params=[CPU, CUDA], ids=["cpu", "cuda"])
def averaged(request):
    with standin(1) as faults:
        made, weights = stage(request.param)
        group = Group()
        UnitSteps._average_with_those_here(made, group)
        kinds = [fault.kind for fault in faults]
        yield SimpleNamespace(
            stage=made, weights=weights, kinds=kinds, mean=group.mean, device=request.param
        )


def test_gradients_and_losses_are_the_mean(averaged):
    first, second = averaged.weights
    assert first.grad.device == averaged.device
    assert first.grad.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert second.grad is None
    losses = averaged.stage.segment_losses
    assert {segment: loss.item() for segment, loss in losses.items()} == {0: 3.0}
    assert losses[0].device == averaged.device
    assert averaged.stage.executor.stop_after == 4


def test_the_host_waits_for_the_device_once(averaged):
    assert averaged.kinds == (["wait"] if averaged.device == CUDA else [])


def test_clipping_leaves_the_mean_as_others_may_need_it(averaged):
    before = averaged.mean.numbers.clone()
    averaged.weights[0].grad.mul_(0.5)
    assert torch.equal(averaged.mean.numbers, before)
