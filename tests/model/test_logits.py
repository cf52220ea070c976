"""What becomes of a readout's product, on hand-worked numbers."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from ds_local.model import heads
from ds_local.model.logits import PLAIN, LogitRule

CAPPED = LogitRule(factor=0.5, cap=2.0)


def test_factor_divisor_and_cap_are_read_from_the_config():
    assert LogitRule.of(SimpleNamespace()) == PLAIN
    assert LogitRule.of(SimpleNamespace(logit_scale=0.25)) == LogitRule(factor=0.25)
    assert LogitRule.of(SimpleNamespace(logits_scaling=8.0)) == LogitRule(divisor=8.0)
    assert LogitRule.of(SimpleNamespace(final_logit_softcapping=30.0)) == LogitRule(cap=30.0)
    assert LogitRule.of(SimpleNamespace(final_logit_softcapping=None)) == PLAIN


def test_values():
    logits = torch.tensor([4.0, -8.0])
    assert torch.equal(PLAIN(logits), logits)
    assert torch.equal(LogitRule(divisor=4.0)(logits), torch.tensor([1.0, -2.0]))
    expected = 2.0 * torch.tanh(torch.tensor([1.0, -2.0]))  # 2 tanh(4 * 0.5 / 2)
    torch.testing.assert_close(CAPPED(logits), expected)


def loss_and_gradients(rule, bias, compute):
    torch.manual_seed(0)
    readout = nn.Linear(6, 9, bias=bias)
    hidden = torch.randn(7, 6, requires_grad=True)
    targets = torch.tensor([0, 8, heads.IGNORE, 3, 3, 1, 2])
    loss = compute(hidden, readout, targets, rule)
    return [loss, *torch.autograd.grad(loss, [hidden, *readout.parameters()])]


def plain(hidden, readout, targets, rule):
    return F.cross_entropy(rule(readout(hidden)), targets, reduction="sum")


def test_losses_of_readouts_with_a_bias_a_factor_or_a_cap_are_exact(monkeypatch):
    rules = PLAIN, LogitRule(factor=3.0), LogitRule(divisor=2.0), CAPPED
    for sliced in (False, True):
        if sliced:
            monkeypatch.setattr(heads, "_PLAIN_LOGITS", 0)
            monkeypatch.setattr(heads, "_SLICE", 2)
        for rule in rules:
            for bias in (False, True):
                ours = loss_and_gradients(
                    rule, bias, lambda h, r, t, rule: heads.readout_loss(h, r, t, "torch", rule)
                )
                theirs = loss_and_gradients(rule, bias, plain)
                for found, expected in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
