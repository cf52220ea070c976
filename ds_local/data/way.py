"""One way through all sources, from the first file to the last, with a bar that shows how far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from ds_local.data.documents import Document, Reading, same_name
from ds_local.data.sources import Source, check_disjoint, open_sources, some
from ds_local.data.tokenizer_training import is_drawn


class Piece(NamedTuple):
    """Of which source a piece of a document is, which split it belongs to, how many bytes it has,
    whether the document ends with it, and from where to where it reaches in which document."""

    source: str
    held_out: bool
    num_bytes: int
    ends: bool
    document: str = ""
    start: int = 0
    stop: int = 0  # characters


class Way:
    """All documents of training and validation sources, in a fixed order.

    Args:
        label: of the bar; "" for none. There is none either where the console is no terminal.

    Raises:
        DataError: when a source does not exist, holds what is not read, or is read for both.
    """

    def __init__(
        self,
        train: Sequence[Source],
        validation: Sequence[Source],
        skip: Sequence[str],
        reading: Reading,
        label: str,
    ) -> None:
        self.reading = reading
        self._train = open_sources(train, reading, skip)
        self._validation = open_sources(validation, reading, skip) if validation else None
        if self._validation is not None:
            check_disjoint(self._train, self._validation)
        self.num_bytes = self._train.num_bytes
        self.num_documents = 0
        self._label = label

    def __enter__(self) -> Way:
        sizes = [self.num_bytes, self._validation.num_bytes if self._validation else 0]
        self._bar = tqdm(
            desc=self._label,
            total=None if None in sizes else sum(filter(None, sizes)),
            unit="B",
            unit_scale=True,
            mininterval=0.5,
            disable=None if self._label else True,
        )
        self.reading.on_bytes = self._bar.update
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def documents(self) -> Iterator[Document]:
        """Those to train on. Raises DataError when there are none."""
        found = (document for _, document in self._train.documents())
        return some(found, self.reading.skipped)

    def pieces(self, share: float) -> Iterator[tuple[Piece, str]]:
        """All pieces with their texts; without validation sources `share` of them is held out.

        Raises:
            DataError: when there are none, or too many rows are malformed.
        """
        own = self._validation is not None
        for source, document in some(self._train.documents(), self.reading.skipped):
            name = f"{same_name(document.name)}:{document.start}"
            yield self._piece(source, document, not own and is_drawn(name, share))
        if self._validation is not None:
            for source, document in some(self._validation.documents(), self.reading.skipped):
                yield self._piece(source, document, True)
        self.reading.skipped.check_share()

    def _piece(self, source: Source, document: Document, held_out: bool) -> tuple[Piece, str]:
        self.num_documents += document.ends
        size = len(document.text.encode())
        name, start, text = document.name, document.start, document.text
        piece = Piece(source.name, held_out, size, document.ends, name, start, start + len(text))
        return piece, text
