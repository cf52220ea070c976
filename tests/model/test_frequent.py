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


def sampled_head(samples=2):
    """Of 64 tokens 7 and 5 are frequent; all others come equally often. The logit of token 6 is
    that of 39 tokens, of 7 of 3, of 5 of 2, of each other one of 1."""
    counts = torch.ones(64, dtype=torch.int64)
    counts[[5, 7]] = torch.tensor([2, 9])
    head = make_head(counts, vocabulary=2, rare_samples=samples)
    with torch.no_grad():
        head.readout.weight.zero_()
        head.readout.weight[[5, 6, 7], 0] = torch.tensor([2.0, 39.0, 3.0]).log() / 2
        head.norm.weight.zero_()
        head.norm.bias.zero_()
        head.norm.bias[0] = 2.0
    return head


def loss_at(head, *tokens):
    labels = torch.tensor([[0, *tokens]])
    return head(torch.randn(1, len(tokens) + 1, 32), labels).item()


def test_an_evaluation_is_over_all_tokens():
    head = sampled_head().eval()
    assert head.readout.weight.shape == (64, 32)
    probabilities = [x / (2 + 3 + 39 + 61) for x in (3, 39, 2, 1)]
    expected = -sum(map(math.log, probabilities)) / 4
    assert loss_at(head, 7, 6, 5, IGNORE, 63) == pytest.approx(expected, rel=1e-6)


def test_draws_stand_for_all_other_tokens(monkeypatch):
    """Two draws from 62 tokens, numbers 1 and 5 of them: tokens 1 and 6 with 1 and 39."""
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([1, 5]))
    head = sampled_head().train()
    for token, others, itself in (
        (7, 2 + 31 * (1 + 39), 3),
        (5, 3 + 31 * (1 + 39), 2),
        (2, 5 + 31 * (1 + 39), 1),  # was not drawn
        (6, 5 + 31 * 1, 39),  # was, and counts once
    ):
        expected = math.log(others + itself) - math.log(itself)
        assert loss_at(head, token) == pytest.approx(expected, rel=1e-5)
    assert loss_at(head, 7, IGNORE, 7) == pytest.approx(loss_at(head, 7), rel=1e-6)


def test_tokens_are_drawn_as_often_as_they_come():
    counts = torch.zeros(64, dtype=torch.int64)
    counts[:4] = torch.tensor([50, 40, 29, 9])
    odds = make_head(counts, vocabulary=2, rare_samples=4).sampled.odds
    assert len(odds) == 62
    assert odds[:3].tolist() == pytest.approx([30 / 100, 10 / 100, 1 / 100])


def test_many_draws_come_near_the_loss_over_all_tokens():
    head = make_head(torch.arange(64) + 64, vocabulary=8, rare_samples=2000)
    torch.nn.init.normal_(head.readout.weight, std=0.3)
    hidden, labels = torch.randn(2, 21, 32), torch.randint(0, 64, (2, 21))
    whole = head.eval()(hidden, labels).item()
    torch.manual_seed(0)
    assert head.train()(hidden, labels).item() == pytest.approx(whole, rel=0.02)


def test_only_what_is_computed_learns():
    head = make_head(torch.arange(64), vocabulary=8, rare_samples=4)
    torch.manual_seed(0)
    head(torch.randn(1, 9, 32), torch.full((1, 9), 3)).backward()
    learning = head.readout.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert {3, *range(56, 64)} <= set(learning)
    assert len(learning) <= 1 + 8 + 4
    head(torch.randn(1, 4, 32), torch.full((1, 4), IGNORE)).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def test_slices_of_positions_are_the_same_loss(monkeypatch):
    head = make_head(torch.arange(64), vocabulary=8, rare_samples=4)
    hidden, labels = torch.randn(2, 700, 32), torch.randint(0, 64, (2, 700))

    def run():
        torch.manual_seed(0)
        head.zero_grad()
        loss = head(hidden, labels)
        loss.backward()
        return loss.item(), head.readout.weight.grad.clone()

    whole, gradient = run()
    monkeypatch.setattr("ds_local.model.heads._PLAIN_LOGITS", 1)
    sliced, other = run()
    assert sliced == pytest.approx(whole, rel=1e-6)
    assert torch.allclose(gradient, other, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"adapter": True},
        {"token_fraction": 0.5},
        {"rank": 4, "rare_samples": 3},
        {"readout": "shared", "adapter": True, "rare_samples": 3},
        {"init": "model", "rare_samples": 3},
    ],
)
def test_it_goes_with_other_options(options):
    head = make_head(torch.arange(64), vocabulary=8, **options)
    labels = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = head(torch.randn(2, 9, 32), labels)
    assert 0 < loss.item() < 2 * math.log(64)
    assert head.readout.out_features == (64 if "rare_samples" in options else 9)


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
