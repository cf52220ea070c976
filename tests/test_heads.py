"""The loss of an auxiliary head."""

import pytest
import torch
from reference import MODELS
from torch.nn import functional as F

from ds_local import blocks
from ds_local.heads import IGNORE, count_targets, lm_loss


def test_lm_loss_predicts_the_next_token():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    assert lm_loss(logits, labels).item() == pytest.approx(expected.item())


def test_ignored_labels_do_not_count():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[1] = IGNORE
    labels[0, 3:] = IGNORE
    expected = F.cross_entropy(logits[0, :2], labels[0, 1:3])
    assert lm_loss(logits, labels).item() == pytest.approx(expected.item())
    assert count_targets(labels).item() == 2
    assert lm_loss(logits, torch.full_like(labels, IGNORE)).item() == 0


def test_the_loss_is_computed_in_float32():
    logits = torch.randn(2, 5, 7).bfloat16()
    assert lm_loss(logits, torch.zeros(2, 5, dtype=torch.long)).dtype == torch.float32


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_is_the_familys_norm_and_a_readout(family, bias):
    config = blocks.load_model_config(MODELS[family])
    head = blocks.make_head(config, 1, seed=3, bias=bias)
    assert type(head.norm) is type(blocks.skeleton(config).get_submodule(blocks.family_of(config).norm))
    assert (head.readout.bias is not None) == bias
    hidden, labels = torch.randn(2, 6, 32), torch.randint(0, 64, (2, 6))
    assert head(hidden, labels).item() == lm_loss(head.readout(head.norm(hidden)), labels).item()
    assert torch.equal(head.readout.weight, blocks.make_head(config, 1, seed=3, bias=bias).readout.weight)
    assert not torch.equal(head.readout.weight, blocks.make_head(config, 2, seed=3, bias=bias).readout.weight)
