"""A data folder, read: fixed-length sequences, and the order in which training sees them.

The order is a pure function of (seed, step): nothing remembers where it was, so a resumed run sees
the batches it would have seen, and every layout of replicas sees the same ones. `corpus.py` makes
such folders. B sequences, T tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import datasets
import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict

from ds_local.data.order import Order, quotas
from ds_local.errors import DataError, first_line
from ds_local.model.heads import IGNORE
from ds_local.outputs import damage, read_list

FORMAT = 3
_READ = (2, 3)  # 2 knows one stream of sequences
KIND = "data folder"
SPLITS = ("train", "validation")
CHECKED_BYTES = 2 << 30  # read at the start, to see whether they are what was written
_MAKE = "make one with scripts/prepare_data.py"

_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(gt=0)]


class _Splits(TypedDict):
    train: _Positive
    validation: _Positive


class SourceFacts(TypedDict):
    """What prepared.json says of a source: its share of the tokens that training sees, and how
    often a pass sees each of its sequences. With a weight it has sequences of its own."""

    name: str
    place: str
    weight: Annotated[float, Field(gt=0)] | None
    documents: _Count
    tokens: _Count
    sequences: _Positive | None
    share: Annotated[float, Field(ge=0, le=1)]
    passes: Annotated[float, Field(ge=0)]


class Facts(TypedDict):
    """What prepared.json says."""

    format: int
    sources: list[str]
    validation_sources: list[str]
    tokenizer: str
    tokenizer_fingerprint: str
    seq_len: _Positive
    vocab_size: _Positive
    eos_token_id: _Count
    documents: _Positive
    skipped: dict[str, _Count]
    skipped_names: dict[str, list[str]]
    tokens: _Positive
    bytes: _Splits
    sequences: _Splits
    mixture: list[SourceFacts]
    document_mask: bool
    fingerprint: str


class TokenData:
    """A data folder that `corpus.prepare` wrote.

    Args:
        verify: compare the files with their checksums, all of them up to `CHECKED_BYTES`, of more
            the small ones and a sample, another one each day. Their sizes are always compared.

    Raises:
        DataError: when it is missing, incomplete or damaged.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.facts = _read_facts(self.folder)
        limit = CHECKED_BYTES if verify else 0
        if damaged := damage(self.folder, limit, sample=date.today().toordinal()):
            raise DataError(f"{self.folder} is damaged: {damaged}; {_again(self.folder)}")
        try:
            self._splits = datasets.load_from_disk(str(self.folder)).with_format("numpy")
            counts = {split: len(self._splits[split]) for split in SPLITS}
        except Exception as error:  # a foreign folder can fail in many ways
            raise DataError(
                f"{self.folder} holds no sequences that can be read ({first_line(error)}); "
                f"{_again(self.folder)}"
            ) from error
        if counts != self.facts["sequences"]:
            raise DataError(
                f"{self.folder} holds {counts} sequences, prepared.json says "
                f"{self.facts['sequences']}"
            )
        self.order = _order(self.folder, self.facts)

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
        rows: Any = list(indices)
        if isinstance(indices, range) and indices.step == 1:
            rows = slice(indices.start, indices.stop)  # which is read faster
        ids = np.asarray(self._splits[split][rows]["input_ids"]).astype(np.int64)
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            raise DataError(
                f"{self.folder}/{split} has token ids from {ids.min()} to {ids.max()} but the "
                f"tokenizer has {self.vocab_size} tokens; the data is damaged or belongs to "
                "another tokenizer"
            )
        return torch.from_numpy(ids)


def _again(folder: Path) -> str:
    """The remedy: `corpus.prepare` replaces a folder that is known to be ours."""
    return "prepare it again" if read_list(folder) else "prepare the data again, in another folder"


def _read_facts(folder: Path) -> Facts:
    """What prepared.json says. Raises DataError when it is missing, or something else."""
    path = folder / "prepared.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{folder} is not a complete data folder ({first_line(error)}); {_MAKE}"
        ) from error
    if not isinstance(found, dict) or found.get("format") not in _READ:
        told = found.get("format") if isinstance(found, dict) else None
        raise DataError(
            f"{path} has data format {told}, this version reads {FORMAT}; {_again(folder)}"
        )
    if found["format"] < FORMAT:
        found = _OF_FORMAT_2 | found
    try:
        return TypeAdapter(Facts).validate_python(found, strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise DataError(f"{path}: {where}: {wrong['msg'].lower()}; {_again(folder)}") from error


_OF_FORMAT_2 = {"validation_sources": [], "mixture": [], "document_mask": False}


def _order(folder: Path, facts: Facts) -> Order:
    """The order of training, by the weights of the sources. Raises DataError."""
    total, sources = facts["sequences"]["train"], facts["mixture"]
    counts = [count for one in sources if (count := one["sequences"]) is not None]
    weights = [weight for one in sources if (weight := one["weight"]) is not None]
    if not sources or not len(counts) == len(weights) == len(sources):
        return Order((total,))
    if sum(counts) != total:
        raise DataError(
            f"{folder}/prepared.json: mixture: sources of {sum(counts)} sequences for {total}; "
            f"{_again(folder)}"
        )
    return Order(tuple(counts), tuple(quotas(counts, weights)))


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
    data: TokenData, seed: int, seen: int, shape: BatchShape
) -> Iterator[tuple[Any, Tensor]]:
    """Micro-batches (inputs, labels) of this replica, without end. B = `micro_batch_size`.

    Args:
        seen: sequences that all replicas together have had before.
    """
    for position in itertools.count(seen, shape.per_step):
        rows = data.order.rows(seed, position, shape.per_step)
        for micro_batch in range(shape.num_micro_batches):
            ids_BT = data.sequences("train", rows[shape.mine(micro_batch)])
            yield micro_batch_of(data, ids_BT, ids_BT)


def micro_batch_of(data: TokenData, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Any, Tensor]:
    """(inputs, labels) of some sequences. With a document mask the inputs have positions that start
    again with each document, by which attention tells documents apart, and no document's first
    token is to be predicted."""
    if not data.facts["document_mask"]:
        return ids_BT, labels_BT
    positions_BT = document_positions(ids_BT, data.facts["eos_token_id"])
    begins = positions_BT == 0
    return (
        {"input_ids": ids_BT, "position_ids": positions_BT},
        labels_BT.masked_fill(begins, IGNORE),
    )


def document_positions(ids_BT: Tensor, end: int) -> Tensor:
    """How many tokens of its document, in the same sequence, are before each token.

    Args:
        end: the token behind each document.
    """
    numbers_T = torch.arange(ids_BT.shape[1])
    begins_BT = torch.zeros_like(ids_BT)
    begins_BT[:, 1:] = torch.where(ids_BT[:, :-1] == end, numbers_T[1:], 0)
    return numbers_T - begins_BT.cummax(1).values


class ValidationBatches(Sequence[tuple[Any, Tensor]]):
    """Micro-batches (inputs, labels) of this replica over validation sequences, each read when it
    is asked for. The last ones are filled up with sequences whose labels do not count."""

    def __init__(self, data: TokenData, shape: BatchShape, indices: Sequence[int]) -> None:
        self.data, self.shape, self.indices = data, shape, indices

    def __len__(self) -> int:
        together = self.shape.micro_batch_size * self.shape.num_replicas
        return (len(self.indices) + together - 1) // together

    def __getitem__(self, micro_batch: Any) -> Any:
        micro_batch = range(len(self))[micro_batch]
        indices = self.indices[self.shape.mine(micro_batch)]
        ids_BT = torch.zeros(self.shape.micro_batch_size, self.data.seq_len, dtype=torch.int64)
        labels_BT = torch.full_like(ids_BT, IGNORE)
        if indices:
            ids_BT[: len(indices)] = self.data.sequences("validation", indices)
            labels_BT[: len(indices)] = ids_BT[: len(indices)]
        return micro_batch_of(self.data, ids_BT, labels_BT)


def validation_batches(
    data: TokenData, shape: BatchShape, max_sequences: int | None = None
) -> ValidationBatches:
    """Micro-batches of this replica over validation sequences: all, or `max_sequences` of them,
    evenly spaced."""
    return ValidationBatches(
        data, shape, evenly_spaced(data.num_sequences("validation"), max_sequences)
    )


def evenly_spaced(total: int, count: int | None = None) -> list[int]:
    """`count` of `total` indices, in order and as far apart as can be; default all.

    Raises:
        DataError: when `count` is less than 1.
    """
    if count is not None and count < 1:
        raise DataError(f"{count} validation sequences were asked for; give at least 1")
    count = total if count is None else min(total, count)
    return [number * total // count for number in range(count)]
