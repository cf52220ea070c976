"""A data folder, read: fixed-length sequences, and the order in which training sees them.

The order is a pure function of (seed, step): nothing remembers where it was, so a resumed run sees
the batches it would have seen, and every layout of replicas sees the same ones. `corpus.py` makes
such folders. B sequences, T tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ds_local.errors import DataError
from ds_local.model.heads import IGNORE

FORMAT = 1


class TokenData:
    """A data folder that `corpus.prepare` wrote.

    Raises:
        DataError: when it is missing, incomplete or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.facts = json.loads((self.folder / "prepared.json").read_text())
            self._splits = datasets.load_from_disk(str(self.folder)).with_format("numpy")
        except (OSError, json.JSONDecodeError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{self.folder} is not a complete data folder ({error}); make one with scripts/prepare_data.py"
            ) from error
        if self.facts.get("format") != FORMAT:
            raise DataError(
                f"{self.folder} has data format {self.facts.get('format')}, this version reads {FORMAT}; prepare it again"
            )
        for split, count in self.facts["sequences"].items():
            if len(self._splits[split]) != count:
                raise DataError(
                    f"{self.folder}/{split} holds {len(self._splits[split])} sequences, prepared.json says {count}"
                )

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def seq_len(self) -> int:
        return self.facts["seq_len"]

    @property
    def vocab_size(self) -> int:
        return self.facts["vocab_size"]

    def num_sequences(self, split: str) -> int:
        return len(self._splits[split])

    def sequences(self, split: str, indices: Sequence[int]) -> Tensor:
        """Token ids of some sequences, int64 [B, T].

        Raises:
            DataError: when an id is outside the vocabulary.
        """
        ids = np.asarray(self._splits[split][list(indices)]["input_ids"]).astype(np.int64)
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            raise DataError(
                f"{self.folder}/{split} has token ids from {ids.min()} to {ids.max()} but the tokenizer has {self.vocab_size} "
                "tokens; the data is damaged or belongs to another tokenizer"
            )
        return torch.from_numpy(ids)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def step_indices(num_sequences: int, seed: int, step: int, per_step: int) -> list[int]:
    """The sequences of optimizer step `step` (from 0): consecutive pieces of one shuffled pass over
    the data after another."""
    positions = range(step * per_step, (step + 1) * per_step)
    return [
        int(_permutation(seed, p // num_sequences, num_sequences)[p % num_sequences])
        for p in positions
    ]


class BatchShape(NamedTuple):
    """How a step's sequences are dealt: micro-batch by micro-batch, within each to the replicas in
    order."""

    micro_batch_size: int
    num_micro_batches: int
    num_replicas: int
    replica: int

    @property
    def per_step(self) -> int:
        return self.micro_batch_size * self.num_micro_batches * self.num_replicas

    def mine(self, micro_batch: int) -> slice:
        """Where this replica's part of a micro-batch lies among the step's sequences."""
        start = (micro_batch * self.num_replicas + self.replica) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


def training_batches(
    data: TokenData, seed: int, start_step: int, shape: BatchShape
) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches (ids, labels) of this replica, from `start_step` on, without end. B =
    `micro_batch_size`."""
    for step in itertools.count(start_step):
        indices = step_indices(data.num_sequences("train"), seed, step, shape.per_step)
        for micro_batch in range(shape.num_micro_batches):
            ids_BT = data.sequences("train", indices[shape.mine(micro_batch)])
            yield ids_BT, ids_BT


def validation_batches(
    data: TokenData, shape: BatchShape, max_sequences: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches (ids, labels) of this replica over the first `max_sequences` validation
    sequences (default all).

    The last ones are filled up with sequences whose labels do not count.
    """
    total = min(data.num_sequences("validation"), max_sequences or data.num_sequences("validation"))
    together = shape.micro_batch_size * shape.num_replicas
    batches = []
    for micro_batch in range(-(-total // together)):
        mine = shape.mine(micro_batch)
        indices = range(mine.start, min(mine.stop, total))
        ids_BT = torch.zeros(shape.micro_batch_size, data.seq_len, dtype=torch.int64)
        labels_BT = torch.full_like(ids_BT, IGNORE)
        if len(indices):
            ids_BT[: len(indices)] = labels_BT[: len(indices)] = data.sequences(
                "validation", indices
            )
        batches.append((ids_BT, labels_BT))
    return batches
