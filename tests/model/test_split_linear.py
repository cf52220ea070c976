"""Deferred weight gradients: hand-worked numbers, and which layers can."""

import copy

import pytest
import torch
from families import VARIANTS, layers_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_local.model import families
from ds_local.model.split_linear import (
    defer_weight_grads,
    make_splittable,
    no_weight_grads,
    run_deferred,
)

X = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])  # one sequence of two tokens


def layer_of(kind):
    """y = x W' + b with W = [[1, 2], [3, 4], [5, 6]]"""
    layer = nn.Linear(2, 3) if kind == "linear" else Conv1D(3, 2)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    with torch.no_grad():
        layer.weight.copy_(weight if kind == "linear" else weight.t())
        layer.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    make_splittable(layer)
    return layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_hand_worked_gradients_come_in_two_halves(kind):
    layer, x = layer_of(kind), X.clone().requires_grad_()
    y = layer(x)
    assert y.tolist() == [[[5.5, 11.0, 16.5], [6.5, 12.0, 17.5]]]
    with defer_weight_grads() as deferred:
        y.backward(torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]]))
    assert x.grad.tolist() == [[[1.0, 2.0], [10.0, 12.0]]]
    assert layer.bias.grad.tolist() == [1.0, 0.0, 2.0]
    assert layer.weight.grad is None
    expected = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 6.0]])
    for times in (1, 2):  # gradients add up
        run_deferred(list(deferred))
        assert torch.equal(
            layer.weight.grad, times * (expected if kind == "linear" else expected.t())
        )


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_nothing_is_deferred_unasked(kind):
    split, plain = layer_of(kind), layer_of(kind)
    plain.__class__ = nn.Linear if kind == "linear" else Conv1D
    for layer in (split, plain):
        layer(X).square().sum().backward()
    assert torch.equal(split.weight.grad, plain.weight.grad)
    assert torch.equal(split.bias.grad, plain.bias.grad)
    with torch.no_grad():
        assert torch.equal(split(X), plain(X))


def test_weight_gradients_that_nobody_wants_are_never_computed():
    layer, x = layer_of("linear"), X.clone().requires_grad_()
    y = layer(x)
    with no_weight_grads():
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [[[9.0, 12.0], [9.0, 12.0]]]
    assert layer.weight.grad is None


def test_hooks_and_autocast_see_what_they_expect():
    """A weight with a hook gets its gradient at once; within autocast a layer is the plain one,
    which keeps to its types."""
    layer = layer_of("linear")
    layer.weight.register_hook(lambda gradient: 2 * gradient)
    with defer_weight_grads() as deferred:
        layer(X).sum().backward()
    assert not deferred
    assert layer.weight.grad.tolist() == [[2.0, 10.0]] * 3
    cast = layer_of("linear")
    with torch.autocast("cpu", torch.bfloat16):
        y = cast(X)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert cast.weight.grad.tolist() == [[1.0, 5.0]] * 3


def test_a_layer_used_twice_and_a_frozen_one():
    layer, frozen = layer_of("linear"), layer_of("linear").requires_grad_(False)
    with defer_weight_grads() as deferred:
        (layer(X).sum() + 2 * layer(X).sum() + frozen(X.clone().requires_grad_()).sum()).backward()
    run_deferred(deferred)
    assert layer.weight.grad.tolist() == [[3.0, 15.0]] * 3
    assert frozen.weight.grad is None


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_linear_layers_of_every_family_can_be_deferred(name):
    """All matrices of a block are deferred, and only norms and biases are left in the first
    half."""
    config = families.load_model_config(VARIANTS[name])
    block = layers_of(config)[1]
    plain = copy.deepcopy(block)
    make_splittable(block)
    hidden = torch.randn(2, 8, config.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer in (block, plain):
        given = hidden.clone().requires_grad_()
        out = layer(given)
        if layer is block:
            with defer_weight_grads() as deferred:
                out.square().sum().backward()
            weights = {id(weight) for weight, _ in deferred}
            assert weights == {id(p) for p in block.parameters() if p.ndim == 2}
            run_deferred(deferred)
        else:
            out.square().sum().backward()
    for (parameter_name, ours), theirs in zip(
        block.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=parameter_name)
