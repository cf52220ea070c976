"""The frequent part of a vocabulary: classes and losses worked out by hand."""

import math

import pytest
import torch
from reference import GPT2

from ds_local.config.sections import HeadConfig
from ds_local.errors import ConfigError
from ds_local.model import blocks, families
from ds_local.model.frequent import FrequentPart, checked_counts
from ds_local.model.heads import IGNORE

PARTS = [0, 2, 3, 4, 6]
COUNTS = [3, 9, 0, 9, 1]


def make_head(counts=None, **options):
    config = families.load_model_config(GPT2)
    return blocks.make_head(config, 0, 3, HeadConfig(**options), PARTS, counts)


def test_classes_go_by_count_then_by_id_and_the_rest_is_the_last():
    part = FrequentPart(torch.tensor(COUNTS), 3)
    tokens = torch.tensor([1, 3, 0, 4, 2, IGNORE])
    assert part(tokens).tolist() == [0, 1, 2, 3, 3, IGNORE]
    assert list(part.state_dict()) == ["class_of"]  # kept with the weights


def test_equal_counts_leave_the_order_of_the_ids():
    part = FrequentPart(torch.zeros(5, dtype=torch.int64), 2)
    assert part(torch.arange(5)).tolist() == [0, 1, 2, 2, 2]


def test_the_loss_is_the_cross_entropy_over_the_classes():
    counts = torch.zeros(64, dtype=torch.int64)
    counts[[5, 7]] = torch.tensor([2, 9])  # classes: 7, 5, the rest
    head = make_head(counts, vocabulary=2)
    assert head.readout.weight.shape == (3, 32)
    with torch.no_grad():
        head.readout.weight.zero_()
        head.readout.weight[:, 0] = torch.tensor([1.0, 2.0, 3.0]).log() / 2
        head.norm.weight.zero_()
        head.norm.bias.zero_()
        head.norm.bias[0] = 2.0  # so that the classes have 1/6, 2/6 and 3/6 at every position
    labels = torch.tensor([[0, 7, 5, 63, IGNORE, 7]])
    expected = (2 * math.log(6) + math.log(6 / 2) + math.log(6 / 3)) / 4
    assert head(torch.randn(1, 6, 32), labels).item() == pytest.approx(expected, rel=1e-6)


def test_the_class_of_the_rest_learns():
    head = make_head(torch.arange(64), vocabulary=8)
    # the target is a rare token at every position
    head(torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.int64)).backward()
    norms = head.readout.weight.grad.norm(dim=1)
    assert norms.argmax() == 8


def silent(linear, *logits):
    """A layer whose outputs are these wherever the first of its inputs is 2 (0 where none)."""
    with torch.no_grad():
        linear.weight.zero_()
        if logits:
            linear.weight[:, 0] = torch.tensor(logits) / 2


def test_rare_tokens_have_the_probability_of_their_class_times_their_own():
    counts = torch.zeros(64, dtype=torch.int64)
    counts[[5, 7]] = torch.tensor([2, 9])  # classes: 7, 5, the rest; 0, 1, 2, 3, 4, 6, 8, ...
    head = make_head(counts, vocabulary=2, rare_rank=3).eval()
    assert head.rare.readout.weight.shape == (62, 3)
    assert head.rare.number_of[[0, 4, 5, 6, 7, 8, 63]].tolist() == [0, 4, IGNORE, 5, IGNORE, 6, 61]
    silent(head.readout, math.log(1), math.log(2), math.log(3))  # 1/6, 2/6 and 3/6
    silent(head.rare.down, 2.0, 0.0, 0.0)
    # token 6 has 39 of 100, the others 1 each
    silent(head.rare.readout, *[math.log(39) if number == 5 else 0.0 for number in range(62)])
    with torch.no_grad():
        head.norm.weight.zero_()
        head.norm.bias.zero_()
        head.norm.bias[0] = 2.0
    labels = torch.tensor([[0, 7, 6, 63, IGNORE, 5]])
    probabilities = [1 / 6, 3 / 6 * 39 / 100, 3 / 6 / 100, 2 / 6]
    expected = -sum(map(math.log, probabilities)) / 4
    assert head(torch.randn(1, 6, 32), labels).item() == pytest.approx(expected, rel=1e-6)


def rare_labels(rare):
    """One sequence of 40 predictions; with counts that rise with the id, 8 frequent tokens are
    those above 55."""
    return torch.tensor([[0] + [60] * (40 - rare) + [3] * rare])


@pytest.mark.parametrize("rare", [0, 4, 10])
def test_up_to_a_quarter_of_rare_tokens_the_loss_is_exact(rare):
    head = make_head(torch.arange(64), vocabulary=8, rare_rank=4)
    hidden, labels = torch.randn(1, 41, 32), rare_labels(rare)
    trained = head.train()(hidden, labels).item()
    assert trained == pytest.approx(head.eval()(hidden, labels).item(), rel=1e-6)


def test_of_more_a_quarter_of_the_positions_is_drawn_without_bias():
    head = make_head(torch.arange(64), vocabulary=8, rare_rank=4)
    torch.nn.init.normal_(head.rare.readout.weight, std=4.0)
    hidden, labels = torch.randn(1, 41, 32), rare_labels(30)
    whole = head.eval()(hidden, labels).item()
    torch.manual_seed(0)
    drawn = torch.tensor([head.train()(hidden, labels).item() for _ in range(600)])
    assert drawn.std() > 0.01
    assert abs(drawn.mean().item() - whole) < 4 * drawn.std().item() / 600**0.5


def test_no_rare_token_is_no_gradient_and_no_nan():
    head = make_head(torch.arange(64), vocabulary=8, rare_rank=4)
    head(torch.randn(1, 41, 32), rare_labels(0)).backward()
    assert head.rare.readout.weight.grad.eq(0).all()
    head(torch.randn(1, 4, 32), torch.full((1, 4), IGNORE)).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "options",
    [{"rank": 4}, {"adapter": True}, {"token_fraction": 0.5}, {"rare_rank": 3}],
)
def test_it_goes_with_other_options(options):
    head = make_head(torch.arange(64), vocabulary=8, **options)
    labels = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = head(torch.randn(2, 9, 32), labels)
    assert 0 < loss.item() < 2 * math.log(64)
    assert head.readout.out_features == 9


def test_counts_of_a_model_whose_vocabulary_is_padded():
    assert checked_counts([4, 0, 2], 5).tolist() == [4, 0, 2, 0, 0]
    assert checked_counts(torch.tensor([1, 2], dtype=torch.int32), 2).dtype == torch.int64


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([1, 2, 3], "token_counts has 3 entries, but the model's vocabulary has 2 tokens"),
        ([0.5, 0.5], "must be a folder .* or a number for each token id.*got list"),
        ([1, -1], "got list"),
        ([0, 0], "got list"),
        ([], "got list"),
        ([[1], [2]], "got list"),
        ({"a": 1}, "got dict"),
        (["a"], "got list"),
        (torch.ones(2, 2, dtype=torch.int64), r"got Tensor of shape \[2, 2\]"),
        (torch.tensor([True, False]), "got Tensor"),
    ],
    ids=str,
)
def test_counts_of_another_kind_are_refused(counts, said):
    with pytest.raises(ConfigError, match=said):
        checked_counts(counts, 2)
