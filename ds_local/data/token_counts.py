"""How often each token comes in a data folder's training split."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ds_local.data.dataset import TokenData, evenly_spaced

_PIECE = 1 << 20  # tokens that are read at a time
_PIECES = 64  # at most: tokens that a few million do not show are rare


def token_counts_of(folder: str | Path) -> Tensor:
    """How often each token comes in a folder of scripts/prepare_data.py, int64 [vocabulary].

    Counted are all training sequences, of more than 67 million tokens pieces of so many together,
    evenly spaced: the same numbers wherever the folder is the same.

    Raises:
        DataError: when it is missing, incomplete or damaged.
    """
    data = TokenData(folder, verify=False)
    sequences, step = data.num_sequences("train"), max(1, _PIECE // data.seq_len)
    starts = range(0, sequences, step)
    counts = torch.zeros(data.vocab_size, dtype=torch.int64)
    for number in evenly_spaced(len(starts), _PIECES):
        rows = range(starts[number], min(starts[number] + step, sequences))
        counts += torch.bincount(data.sequences("train", rows).flatten(), minlength=len(counts))
    return counts
