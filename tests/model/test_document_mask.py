"""Documents of one sequence, kept apart: what each gives and learns is what it gives alone."""

import pytest
import torch
from families import VARIANTS, layers_of, run
from sentences import one_sentence
from torch.nn import functional as F

from ds_local.data.dataset import document_positions
from ds_local.errors import UnsupportedModel
from ds_local.model import document_mask, families
from ds_local.model.document_mask import check_keeps_documents_apart
from ds_local.model.heads import IGNORE

END = 0
LENGTHS = ((5, 1, 10), (16,), (2, 7, 7))  # of the documents of each sequence, ends included


@pytest.fixture(params=sorted(VARIANTS))
def config(request):
    return families.load_model_config(VARIANTS[request.param])


def packed():
    """Sequences of documents, each with an end."""
    ids = torch.randint(1, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    for row, lengths in enumerate(LENGTHS):
        ids[row, torch.tensor(lengths).cumsum(0) - 1] = END
    return ids


def test_positions_start_again_with_each_document():
    positions = document_positions(packed(), END)
    for row, lengths in enumerate(LENGTHS):
        assert positions[row].tolist() == [i for length in lengths for i in range(length)]
    assert document_positions(torch.tensor([[0, 0, 3, 0]]), END).tolist() == [[0, 0, 0, 1]]
    assert document_positions(torch.tensor([[4, 5, 3, 1]]), END).tolist() == [[0, 1, 2, 3]]


def test_logits_losses_and_gradients_are_those_of_each_document_alone(config):
    ids = packed()
    positions = document_positions(ids, END)
    labels = ids.masked_fill(positions == 0, IGNORE)
    layers = torch.nn.ModuleList(layers_of(config))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    together = run(layers, {"input_ids": ids, "position_ids": positions})
    loss = F.cross_entropy(together[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in layers.parameters()]
    layers.zero_grad()

    total = torch.zeros(())
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            alone = run(layers, ids[row : row + 1, start : start + length])
            torch.testing.assert_close(
                together[row : row + 1, start : start + length], alone, rtol=1e-5, atol=1e-5
            )
            targets = ids[row, start + 1 : start + length]
            total = total + F.cross_entropy(alone[0, :-1], targets, reduction="sum")
            start += length
    counted = sum(length - 1 for lengths in LENGTHS for length in lengths)
    (total / counted).backward()
    torch.testing.assert_close(loss, total / counted)
    for found, parameter in zip(gradients, layers.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
    plain = run(layers, ids)
    assert not torch.allclose(plain[0, 6:], together[0, 6:])  # without the mask they differ


def test_every_family_keeps_documents_apart(config):
    check_keeps_documents_apart(config)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(1, 8),
        torch.ones(8, 8).tril().bool()[None, None],
        torch.zeros(8, 8).masked_fill(torch.ones(8, 8).triu(1) > 0, -1e9)[None, None],
    ],
    ids=["none", "of padding", "causal alone", "causal, in numbers"],
)
def test_a_model_that_does_not_is_refused(monkeypatch, mask):
    config = families.load_model_config(VARIANTS["llama"])
    monkeypatch.setattr(document_mask, "_taken", lambda *_: {"attention_mask": mask})
    with one_sentence("block 0 of llama does not keep", error=UnsupportedModel):
        check_keeps_documents_apart(config)
