"""Sequences of several sources: packed together, or with weights each by itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from ds_local.data.order import quotas
from ds_local.data.packing import Packer
from ds_local.data.sources import Source
from ds_local.data.way import Piece
from ds_local.errors import DataError


class Mixture:
    """The packers of all sources, and what each source gave.

    Args:
        sources: to train on. Without weights one stream of sequences holds all of them; with
            weights each has its own, so that training can take them in any ratio.
        folder: of the files.
        end: the end-of-text token.
        borders: put one also where a piece in the other split interrupts a document. Long ones lie
            in both splits, piece by piece.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        folder: Path,
        dtype: type[np.generic],
        seq_len: int,
        end: int,
        borders: bool = False,
    ) -> None:
        self.end, self.seq_len, self.borders = end, seq_len, borders
        self.weights = {one.name: one.weight for one in sources}
        self.places = {one.name: one.place for one in sources}
        self.weighted = None not in self.weights.values()
        streams = list(self.weights) if self.weighted else [""]
        self.train = {
            stream: Packer(folder / f"train-{number}.arrow", dtype, seq_len)
            for number, stream in enumerate(streams)
        }
        self.validation = Packer(folder / "validation.arrow", dtype, seq_len)
        self.documents: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        # of a split: source, document and place at which it would go on; nothing after an end
        self._open: dict[Packer, tuple[str, str, int]] = {}

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        """A piece of a document, and its tokens."""
        stream = piece.source if self.weighted else ""
        packer = self.validation if piece.held_out else self.train[stream]
        if self.borders:
            self._close(packer, (piece.source, piece.document, piece.start))
            if not piece.ends:
                self._open[packer] = piece.source, piece.document, piece.stop
        count = packer.add(ids, piece.num_bytes, self.end if piece.ends else None)
        self._count(piece.source, count)
        if piece.source in self.weights:
            self.documents[piece.source] += piece.ends

    def _close(self, packer: Packer, following: tuple[str, str, int]) -> None:
        """End the document that does not go on with what follows."""
        before = self._open.pop(packer, following)
        if before != following:
            self._count(before[0], packer.add(np.empty(0, packer.dtype), 0, self.end))

    def _count(self, source: str, tokens: int) -> None:
        if source in self.weights:  # not one of validation alone
            self.tokens[source] += tokens

    def balance(self, share: float) -> None:
        """See that both splits have sequences, if there is text for both."""
        if len(self.train) == 1 and not next(iter(self.train.values())).available:
            (stream,) = self.train  # the only document was held out
            self.train[stream], self.validation = self.validation, self.train[stream]
        if not self.validation.available:  # few documents: hold out the end of the last one
            most = max(self.train.values(), key=lambda packer: packer.available)
            most.give_last_to(self.validation, share)

    @property
    def packers(self) -> list[Packer]:
        return [*self.train.values(), self.validation]

    def count(self, what: Literal["tokens", "num_bytes"]) -> dict[str, int]:
        """Of each split."""
        train = sum(getattr(packer, what) for packer in self.train.values())
        return {"train": train, "validation": getattr(self.validation, what)}

    def finish(self) -> dict[str, datasets.Dataset]:
        """Both splits.

        Raises:
            DataError: when one of them, or a source with a weight, has no sequence.
        """
        train = {stream: packer.finish() for stream, packer in self.train.items()}
        validation = self.validation.finish()
        short = [stream for stream, rows in train.items() if stream and not len(rows)]
        if short:
            raise DataError(
                f"the source {short[0]!r} has {self.tokens[short[0]]} tokens, too few for a "
                f"sequence of {self.seq_len}; add text, lower --seq-len, or leave it out"
            )
        return {
            "train": datasets.concatenate_datasets(list(train.values())),
            "validation": validation,
        }

    def facts(self) -> list[dict[str, Any]]:
        """Of each source: its share of the tokens that training sees, and how often a pass sees
        each of its sequences."""
        counts = [packer.sequences for packer in self.train.values()]
        weights = [weight or 0.0 for weight in self.weights.values()]
        shares = quotas(counts, weights) if self.weighted else counts
        total = max(1, self.tokens.total())
        return [
            {
                "name": name,
                "place": self.places[name],
                "weight": self.weights[name],
                "documents": self.documents[name],
                "tokens": self.tokens[name],
                "sequences": counts[number] if self.weighted else None,
                "share": shares[number] / sum(shares)
                if self.weighted
                else self.tokens[name] / total,
                "passes": shares[number] / counts[number] if self.weighted else 1.0,
            }
            for number, name in enumerate(self.weights)
        ]

    def fingerprint(self, *settings: Any) -> str:
        """Of all sequences, of their weights, and of settings that change what is learned."""
        train = "".join(packer.digest.hexdigest() for packer in self.train.values())
        told = [train + self.validation.digest.hexdigest()]
        told += [str(self.weights)] * self.weighted + [str(one) for one in settings if one]
        return hashlib.sha256("".join(told).encode()).hexdigest()
