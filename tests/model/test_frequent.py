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


@pytest.mark.parametrize("options", [{"rank": 4}, {"adapter": True}, {"token_fraction": 0.5}])
def test_it_goes_with_other_options(options):
    head = make_head(torch.arange(64), vocabulary=8, **options)
    labels = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = head(torch.randn(2, 9, 32), labels)
    assert 0 < loss.item() < 2 * math.log(9)
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
