"""What a data loader may give, and what is said about the rest."""

import pytest
import torch

from ds_local.engine import batches
from ds_local.engine.batches import TokenBatches, split_batch
from ds_local.errors import DataError

IDS = torch.arange(8).view(2, 4)


def split(batch, vocab_size=8, num_positions=None):
    return TokenBatches(vocab_size, num_positions).split(batch)


@pytest.mark.parametrize(
    "batch",
    [
        IDS,
        (IDS, IDS),
        [IDS, IDS.int()],
        IDS.int(),
        IDS.to(torch.uint8),
        {"input_ids": IDS},
        {"input_ids": IDS.short(), "labels": IDS, "attention_mask": None},
        ({"input_ids": IDS}, IDS),
    ],
    ids=lambda b: type(b).__name__,
)
def test_every_form_of_token_ids(batch):
    ids, labels = split(batch)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, IDS)
    assert torch.equal(labels.long(), IDS)


def test_mask_and_positions_go_with_the_ids():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    positions = torch.arange(4).view(1, 4).int()
    given = {"input_ids": IDS, "attention_mask": mask, "position_ids": positions, "labels": IDS}
    labels = given.pop("labels")
    for batch in ({**given, "labels": labels}, (given, labels)):
        inputs, _ = split(batch)
        assert list(inputs) == ["input_ids", "attention_mask", "position_ids"]
        assert inputs["attention_mask"].dtype == torch.bool
        assert inputs["position_ids"].dtype == torch.int64
    four = torch.zeros(2, 1, 4, 4)
    assert split({"input_ids": IDS, "attention_mask": four})[0]["attention_mask"] is four


IGNORED = IDS.clone().index_fill_(1, torch.tensor([3]), -100)
REFUSED = [
    (IDS.float(), "input_ids has dtype float32; it must be integers: convert it with .long()"),
    ((IDS, IDS.float()), "labels has dtype float32"),
    (IDS > 3, "input_ids has dtype bool"),
    (IDS + 3, r"input_ids has 8 at \[1, 1\], but the model has 8 tokens .*: give 0 to 7; was the"),
    (IDS - 1, r"input_ids has -1 at \[0, 0\]"),
    (IGNORED, r"input_ids has -100 at \[0, 3\]"),
    ((IDS, IDS + 1), r"labels has 8 at \[1, 3\], .* give 0 to 7, or -100 where no token"),
    ((IDS, IGNORED - 1), r"labels has -1 at \[0, 0\]"),
    ((IDS, IGNORED * 2), r"labels has -200 at \[0, 3\]"),
    ((IDS, IDS[:, :3]), r"labels has shape \[2, 3\] but input_ids has \[2, 4\]; they must agree"),
    (IDS[0], r"input_ids has shape \[4\]; it must be \[sequences, tokens\]"),
    (
        {"input_ids": IDS.tolist()},
        r"input_ids is a list; give a tensor; .* with_format",
    ),
    ({"input_ids": IDS, "token_type_ids": IDS}, "a micro-batch has token_type_ids, which nothing"),
    ({"ids": IDS}, "a micro-batch has ids, which nothing reads; a dict holds attention_mask, inp"),
    ({"labels": IDS}, "a micro-batch has no input_ids but labels"),
    ({}, "a micro-batch has no input_ids"),
    ({"input_ids": IDS, "attention_mask": IDS[:1]}, r"attention_mask has shape \[1, 4\]"),
    ({"input_ids": IDS, "position_ids": IDS[0]}, r"position_ids has shape \[4\]"),
    ({"input_ids": IDS, "position_ids": IDS}, r"position_ids has 4 at \[1, 0\], .* 4 positions"),
    ((IDS, IDS, IDS), r"a micro-batch must be \(inputs, labels\), .* got tuple"),
    (None, "got NoneType"),
]


@pytest.mark.parametrize(("batch", "words"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_used_is_refused_in_a_sentence(batch, words):
    with pytest.raises(DataError, match=words) as error:
        split(batch, num_positions=4)
    assert "\n" not in str(error.value)


def test_sequences_longer_than_the_learned_positions_are_refused():
    with pytest.raises(DataError, match="sequences of 4 tokens but the model takes at most 3"):
        split(IDS, num_positions=3)
    split({"input_ids": IDS, "position_ids": IDS % 3}, num_positions=3)
    assert split((IDS, IGNORED))[1][0].tolist() == [0, 1, 2, -100]


def test_layers_of_ones_own_get_what_they_are_given():
    inputs, labels = {"x": [IDS, None]}, (IDS, 1.0)
    assert split_batch((inputs, labels)) == (inputs, labels)
    assert split_batch({"input_ids": IDS})[1] is IDS
    with pytest.raises(
        DataError, match=r"has attention_mask, which nothing reads; .* may be a dict"
    ):
        split_batch({"input_ids": IDS, "attention_mask": IDS})


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(batches.logger, "warning", said.append)
    return said


@pytest.mark.parametrize("ignored", [0, 1])
def test_shifted_labels_are_refused(ignored):
    reader = TokenBatches(9, None)
    shifted = IDS + 1
    shifted[0, :ignored] = -100
    with pytest.raises(DataError, match=r"shifted by one already, .*give the input ids as labels"):
        reader.split((IDS, shifted))


@pytest.mark.parametrize(
    "labels",
    [IDS, IGNORED, IDS.flip(1), torch.full_like(IDS, -100), None],
    ids=["the ids", "some ignored", "others", "all ignored", "none"],
)
def test_other_labels_are_not(warnings, labels):
    split((IDS, labels))
    split((torch.ones_like(IDS), torch.ones_like(IDS)))
    assert not warnings


def test_padding_without_labels_is_said(warnings):
    mask = torch.ones_like(IDS)
    split({"input_ids": IDS, "attention_mask": mask})
    assert not warnings
    mask[0, 0] = 0
    split({"input_ids": IDS, "attention_mask": mask, "labels": IDS})
    assert not warnings
    split({"input_ids": IDS, "attention_mask": mask})
    assert "padding is predicted too" in warnings[0]
