"""The companion of a head: its loss by hand, where its gradient goes, which positions count."""

import math

import pytest
import torch
from reference import GPT2
from torch import nn

from ds_local.config.sections import HeadConfig
from ds_local.data.dataset import document_positions
from ds_local.model import blocks, families
from ds_local.model.companion import Companion
from ds_local.model.heads import IGNORE

PARTS = [0, 2, 3, 4, 6]


def make_head(**options):
    config = families.load_model_config(GPT2)
    return blocks.make_head(config, 0, 3, HeadConfig(**options), PARTS).train()


@pytest.fixture
def companion():
    """It foresees twice what it is given; the scale does not matter."""
    foresee = nn.Linear(2, 2, bias=False)
    nn.init.eye_(foresee.weight)
    with torch.no_grad():
        foresee.weight.mul_(2)
    return Companion(foresee, 0.5)


HIDDEN = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [1.0, 1.0], [9.0, 9.0]]])
SHALLOW = torch.tensor([[[9.0, 9.0], [2.0, 0.0], [0.0, -1.0], [0.0, 4.0]]])
# of 1 - cosine at the first three positions, each against the next token: 0, 2, 1 - 1 / sqrt 2
THIRD = 1 - 1 / math.sqrt(2)


def test_the_loss_by_hand(companion):
    loss = companion(HIDDEN, SHALLOW, torch.tensor([[4, 4, 4, 4]]))
    assert loss.item() == pytest.approx(0.5 * (0 + 2 + THIRD) / 3)


def test_positions_whose_next_token_has_no_label_do_not_count(companion):
    loss = companion(HIDDEN, SHALLOW, torch.tensor([[4, 4, IGNORE, 4]]))
    assert loss.item() == pytest.approx(0.5 * (0 + THIRD) / 2)
    assert companion(HIDDEN, SHALLOW, torch.full((1, 4), IGNORE)).item() == 0


def test_nothing_is_foreseen_across_the_border_of_two_documents(companion):
    ids = torch.tensor([[5, 0, 6, 7]])  # 0 ends a document
    labels = ids.masked_fill(document_positions(ids, 0) == 0, IGNORE)  # as `micro_batch_of` does
    assert labels.tolist() == [[IGNORE, 0, IGNORE, 7]]
    other = SHALLOW.clone()
    other[0, 2] = torch.tensor([7.0, 5.0])  # the first token of the second document
    assert companion(HIDDEN, other, labels).equal(companion(HIDDEN, SHALLOW, labels))


def test_what_is_foreseen_takes_no_gradient(companion):
    hidden, shallow = HIDDEN.clone().requires_grad_(), SHALLOW.clone().requires_grad_()
    companion(hidden, shallow, torch.tensor([[4, 4, 4, 4]])).backward()
    assert shallow.grad is None
    assert hidden.grad[0, 2].abs().sum() > 0
    assert hidden.grad[0, 3].abs().sum() == 0  # nothing follows it


def gradients(head, hidden, labels, shallow):
    torch.manual_seed(0)
    given = hidden.clone().requires_grad_()
    loss = head(given, labels, shallow)
    loss.backward()
    return loss, given.grad


def test_a_head_reports_its_own_loss_and_learns_from_both():
    hidden, shallow = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    labels = torch.randint(0, 64, (2, 9))
    sampled, both = make_head(token_fraction=0.25), make_head(token_fraction=0.25, companion=0.5)
    loss, gradient = gradients(sampled, hidden, labels, shallow)
    value, total = gradients(both, hidden, labels, shallow)
    assert value.equal(loss)  # the companion's is not in it
    given = hidden.clone().requires_grad_()
    both.companion(both.norm(given), shallow, labels).backward()
    torch.testing.assert_close(total, gradient + given.grad)
    at = total.flatten(0, 1).abs().sum(1) > 0
    assert at.sum() == 16  # all positions but the last of each sequence: it is dense
    assert (gradient.flatten(0, 1).abs().sum(1) > 0).sum() <= 4
    assert both.companion.foresee.weight.grad.abs().sum() > 0


def test_it_is_of_training_alone():
    head = make_head(companion=0.5)
    hidden, labels = torch.randn(2, 9, 32), torch.randint(0, 64, (2, 9))
    plain = make_head().eval()(hidden, labels)
    assert head.eval()(hidden, labels, torch.randn(2, 9, 32)).equal(plain)
    assert head.train()(hidden, labels).equal(plain)  # where nobody gives it the input
    assert torch.equal(make_head().readout.weight, head.readout.weight)  # drawn as without it
