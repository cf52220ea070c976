"""Token ids -> sequences of one length, on the disk: concatenate and cut."""

from __future__ import annotations

import hashlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

# sequences written last, so that the validation split can have some if no document was held out
HELD_BACK = 256
_TOKENS_HELD = 1 << 24  # of which no more than this are held


class Packer:
    """Concatenates documents and cuts them into sequences of `seq_len` tokens, in a file."""

    def __init__(self, path: Path, dtype: type[np.generic], seq_len: int) -> None:
        self.path, self.dtype, self.seq_len = path, dtype, seq_len
        self.features = datasets.Features(
            {"input_ids": datasets.List(datasets.Value(np.dtype(dtype).name), length=seq_len)}
        )
        self._held_back = max(1, min(HELD_BACK, _TOKENS_HELD // seq_len))
        self.writer = ArrowWriter(features=self.features, path=str(path))
        self.tokens = self.of_text = self.sequences = self.num_bytes = 0
        self.digest = hashlib.sha256()
        self._held: list[np.ndarray] = []
        self._num_held = 0  # tokens

    def add(self, ids: np.ndarray, num_bytes: int, end: int | None) -> int:
        """Take a piece of a document; how many tokens it became.

        Args:
            ids: its tokens.
            num_bytes: of its text.
            end: the end-of-text token, if the document ends here.
        """
        self.of_text += len(ids)
        if end is not None and not (len(ids) and ids[-1] == end):
            ids = np.append(ids, self.dtype(end))
        self.tokens += len(ids)
        self.num_bytes += num_bytes
        self._held.append(ids)
        self._num_held += len(ids)
        whole = self._num_held // self.seq_len - self._held_back
        if whole >= self._held_back:
            self._write_first(whole)
        return len(ids)

    def _write_first(self, count: int) -> None:
        """Write the first sequences of those that are held."""
        held = np.concatenate(self._held)
        size = count * self.seq_len
        self._write(held[:size].reshape(count, self.seq_len))
        self._hold(held[size:].copy())

    def _hold(self, ids: np.ndarray) -> None:
        self._held, self._num_held = [ids], len(ids)

    def _write(self, rows: np.ndarray) -> None:
        self.sequences += len(rows)
        self.digest.update(rows.tobytes())
        flat = pa.array(rows.ravel())
        self.writer.write_table(
            pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(flat, self.seq_len)})
        )

    @property
    def available(self) -> int:
        """Whole sequences, written and not yet written."""
        return self.sequences + self._num_held // self.seq_len

    def give_last_to(self, other: Packer, share: float) -> None:
        """Move the last sequences of this split, those not yet written, to `other`."""
        whole = self._num_held // self.seq_len
        given = min(whole, max(1, round(share * self.available)))
        if given:
            held = np.concatenate(self._held)
            first, last = (whole - given) * self.seq_len, whole * self.seq_len
            rows = held[first:last].reshape(given, self.seq_len)
            other._write(rows)
            other.num_bytes = round(self.num_bytes * rows.size / self.tokens)
            self.num_bytes -= other.num_bytes
            self._hold(held[:first])

    def finish(self) -> datasets.Dataset:
        """All sequences, from the file."""
        if whole := self._num_held // self.seq_len:
            self._write_first(whole)
        self.writer.finalize()
        if not self.sequences:
            return datasets.Dataset.from_dict({"input_ids": []}, features=self.features)
        found = datasets.Dataset.from_file(str(self.path))
        # its own fingerprint is one of the file's name and time
        return datasets.Dataset(found.data, found.info, fingerprint=self.digest.hexdigest()[:16])
