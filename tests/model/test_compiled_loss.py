"""The compiled loss of a readout, beside the plain one."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from ds_local.model import compiled_loss
from ds_local.model.heads import linear_cross_entropy


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_compiled_loss_computes_the_gradients_that_are_wanted(wanted):
    hidden = torch.randn(1100, 24, requires_grad=wanted[0])
    weight = torch.randn(2000, 24, requires_grad=wanted[1])
    targets = torch.randint(0, 2000, (1100,))
    loss = linear_cross_entropy(hidden, weight, targets, "compiled")
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
        found = (torch.autograd.grad(one * 3, inputs) for one in (loss, plain))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_without_gradients_none_is_computed(monkeypatch):
    weight = torch.randn(300, 24, requires_grad=True)
    asked = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: asked.append(a))
    with torch.no_grad():
        linear_cross_entropy(torch.randn(50, 24), weight, torch.randint(0, 300, (50,)), "compiled")
    assert not asked


KINDS = [  # width, vocabulary, what learns
    (width, vocabulary, wanted)
    for width, vocabulary in [(32, 300), (16, 300), (16, 100)]
    for wanted in [(True, True), (True, False), (False, True), (False, False)]
]


def test_it_is_compiled_for_every_kind_that_a_run_has(monkeypatch, caplog):
    """torch gives up after eight: of a model's own readout and of heads with a bottleneck or a part
    of the vocabulary, in training and evaluation."""
    monkeypatch.setattr(compiled_loss, "SLICE", 400)  # the last slice is shorter
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    limit = torch._dynamo.config.cache_size_limit
    compiled_loss._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    try:
        for width, vocabulary, wanted in KINDS:
            hidden = torch.randn(600, width, requires_grad=wanted[0])
            weight = torch.randn(vocabulary, width, requires_grad=wanted[1])
            targets = torch.randint(0, vocabulary, (600,))
            loss = compiled_loss.compiled_cross_entropy(hidden, weight, targets)
            plain = compiled_loss._slice_loss(hidden, weight, targets)
            torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        assert counters["stats"]["unique_graphs"] > 8
        assert "recompile_limit" not in caplog.text
    finally:
        torch._dynamo.reset()
        compiled_loss._compiled.cache_clear()
        torch._dynamo.config.cache_size_limit = limit
