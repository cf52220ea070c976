"""Counts of the tokens of a data folder, all of it or evenly spaced pieces."""

import pytest
import torch
from test_dataset import folder, tokenizer  # noqa: F401 - fixtures

from ds_local.data import token_counts
from ds_local.data.dataset import TokenData
from ds_local.data.token_counts import token_counts_of
from ds_local.errors import DataError


@pytest.mark.parametrize("piece", [1 << 20, 100, 16])
def test_all_training_sequences_are_counted(folder, piece, monkeypatch):  # noqa: F811
    monkeypatch.setattr(token_counts, "_PIECE", piece)
    monkeypatch.setattr(token_counts, "_PIECES", 10**6)
    data = TokenData(folder)
    rows = data.sequences("train", range(data.num_sequences("train")))
    counts = token_counts_of(folder)
    assert torch.equal(counts, torch.bincount(rows.flatten(), minlength=data.vocab_size))
    assert counts.sum() == data.num_sequences("train") * 16


def test_of_much_data_evenly_spaced_pieces_are_counted(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(token_counts, "_PIECE", 32)
    monkeypatch.setattr(token_counts, "_PIECES", 2)
    data = TokenData(folder)
    pieces = range(0, data.num_sequences("train"), 2)
    second = pieces[len(pieces) // 2]
    rows = data.sequences("train", [0, 1, second, second + 1])
    wanted = torch.bincount(rows.flatten(), minlength=data.vocab_size)
    assert torch.equal(token_counts_of(folder), wanted)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a complete data folder"):
        token_counts_of(tmp_path)
