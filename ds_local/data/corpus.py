"""Documents -> a data folder: tokenize, pack, hold out a part.

Packing is concatenate-and-chunk with the end-of-text token behind each document. The folder holds
an Arrow dataset of fixed-length sequences with train and validation splits, a tokenizer that
`AutoTokenizer.from_pretrained` loads, prepared.json, and a list of its files with checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ds_local.data.dataset import FORMAT, KIND, SPLITS
from ds_local.data.readers import Document, Skipped
from ds_local.data.sources import documents
from ds_local.data.tokenizers import encode, fingerprint, make_tokenizer, save_tokenizer
from ds_local.errors import DataError
from ds_local.outputs import new_folder

# characters tokenized at once: a 50 MB line must not need 50 MB of tokenizer lattice
PIECE = 100_000
# sequences written last, so that the validation split can have some if no document was held out
HELD_BACK = 256
_LENGTHS = range(2, 2**24)  # of a sequence: two tokens have one to predict


def prepare(
    sources: Sequence[str],
    tokenizer_spec: str,
    seq_len: int,
    output: str | Path,
    validation_share: float = 0.02,
    progress: bool = True,
    skip: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the data folder `output`; an existing one of ours is replaced when the new one is
    complete, anything else is left alone.

    Args:
        sources: see `sources.documents`.
        tokenizer_spec: see `make_tokenizer`.
        seq_len: tokens in a sequence.
        validation_share: share of the documents (of a long one: of its pieces) held out; at least
            one sequence is.
        skip: patterns of files in folders to leave out.

    Returns:
        What is in prepared.json: counts of documents and sequences, what was skipped and why, a
        fingerprint.

    Raises:
        DataError: when a source or the tokenizer cannot be used, there is too little text, or
            `output` is not ours to replace or cannot be written.
    """
    _check_numbers(seq_len, validation_share)
    _check_apart(sources, Path(output))
    with new_folder(output, KIND, DataError) as new:
        tokenizer = make_tokenizer(tokenizer_spec, documents(sources, Skipped(), skip))
        skipped = Skipped()
        scratch = new.parent
        packers = {
            split: _Packer(scratch / f"{split}.arrow", tokenizer, seq_len) for split in SPLITS
        }
        shown = tqdm(
            documents(sources, skipped, skip),
            desc="tokenizing",
            unit=" documents",
            disable=not progress,
            mininterval=1,
        )
        num_documents = 0
        for document in shown:
            num_documents += 1
            _pack(document, packers, validation_share)
        if not any(packer.of_text for packer in packers.values()):
            raise DataError(f"the tokenizer {tokenizer_spec!r} gives no tokens for this text")
        splits = _split(packers, validation_share)
        if any(len(split) == 0 for split in splits.values()):
            raise DataError(
                f"the sources give {sum(p.tokens for p in packers.values())} tokens, too few for "
                f"train and validation sequences of {seq_len} (left out: {skipped or 'nothing'}); "
                "add text or lower --seq-len"
            )
        datasets.disable_progress_bars()
        datasets.DatasetDict(splits).save_to_disk(new)
        save_tokenizer(tokenizer, new / "tokenizer")
        facts = {
            "format": FORMAT,
            "sources": list(sources),
            "tokenizer": tokenizer_spec,
            "tokenizer_fingerprint": fingerprint(tokenizer),
            "seq_len": seq_len,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "documents": num_documents,
            "skipped": dict(skipped.counts),
            "skipped_names": dict(skipped.names),
            "tokens": sum(p.tokens for p in packers.values()),
            "bytes": {split: packer.num_bytes for split, packer in packers.items()},
            "sequences": {split: len(rows) for split, rows in splits.items()},
            "fingerprint": hashlib.sha256(
                "".join(packers[s].digest.hexdigest() for s in sorted(packers)).encode()
            ).hexdigest(),
        }
        (new / "prepared.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _check_numbers(seq_len: int, validation_share: float) -> None:
    if seq_len not in _LENGTHS:
        raise DataError(
            f"--seq-len is {seq_len}; give from {_LENGTHS[0]} to {_LENGTHS[-1]:,} tokens"
        )
    if not 0 <= validation_share < 1:  # NaN too
        raise DataError(
            f"--validation-share is {validation_share}; give at least 0 and less than 1, for "
            "example 0.02"
        )


def _check_apart(sources: Sequence[str], output: Path) -> None:
    """No source may be in what is replaced, nor the output among what is read."""
    place = Path(os.path.realpath(output))
    for source in sources:
        path = Path(os.path.realpath(source))
        if not source or source.startswith("hub:") or not os.path.exists(path):
            continue
        if path == place or path in place.parents or place in path.parents:
            raise DataError(
                f"--output {output} and the source {source} are in one another; choose an --output "
                "outside of all sources"
            )


def _pack(document: Document, packers: dict[str, _Packer], validation_share: float) -> None:
    for start in range(0, len(document.text), PIECE):
        held_out = _held_out(f"{document.name}:{start}", validation_share)
        packers["validation" if held_out else "train"].add(
            document.text[start : start + PIECE], ends=start + PIECE >= len(document.text)
        )


def _split(packers: dict[str, _Packer], validation_share: float) -> dict[str, datasets.Dataset]:
    """Both splits, neither empty if there is text for both."""
    train, validation = (packers[split] for split in SPLITS)
    if not train.available:  # the only document was held out
        train, validation = validation, train
        packers.update(train=train, validation=validation)
    if not validation.available:  # few documents: hold out the end of the last one
        train.give_last_to(validation, validation_share)
    return {split: packer.finish() for split, packer in packers.items()}


def _held_out(name: str, share: float) -> bool:
    return (
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
        < share * 2**32
    )


class _Packer:
    """Concatenates documents and cuts them into sequences of one length."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        # as wide as the ids need, added tokens included
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
        self.features = datasets.Features(
            {"input_ids": datasets.List(datasets.Value(np.dtype(self.dtype).name), length=seq_len)}
        )
        self.path = path
        self.writer = ArrowWriter(features=self.features, path=str(path))
        self.buffer = np.empty(0, dtype=self.dtype)
        self.tokens = self.of_text = self.sequences = self.num_bytes = 0
        self.digest = hashlib.sha256()

    def add(self, text: str, ends: bool) -> None:
        """Take a piece of a document; `ends`: it is the last one."""
        ids = encode(self.tokenizer, text)
        self.of_text += len(ids)
        if ends:
            ids = [*ids, self.tokenizer.eos_token_id]
        if max(ids, default=0) >= len(self.tokenizer):
            raise DataError(
                f"the tokenizer gave the id {max(ids)} but says it has {len(self.tokenizer)} tokens"
            )
        self.tokens += len(ids)
        self.num_bytes += len(text.encode())
        self.buffer = np.concatenate([self.buffer, np.asarray(ids, dtype=self.dtype)])
        whole = len(self.buffer) // self.seq_len - HELD_BACK
        if whole >= HELD_BACK:
            self._write(self.buffer[: whole * self.seq_len].reshape(whole, self.seq_len))
            self.buffer = self.buffer[whole * self.seq_len :]

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
        return self.sequences + len(self.buffer) // self.seq_len

    def give_last_to(self, other: _Packer, share: float) -> None:
        """Move the last sequences of this split, those not yet written, to `other`."""
        whole = len(self.buffer) // self.seq_len
        given = min(whole, max(1, round(share * self.available)))
        if given:
            rows = self.buffer[(whole - given) * self.seq_len : whole * self.seq_len].reshape(
                given, self.seq_len
            )
            other._write(rows)
            other.num_bytes = round(self.num_bytes * rows.size / self.tokens)
            self.buffer = self.buffer[: (whole - given) * self.seq_len]

    def finish(self) -> datasets.Dataset:
        whole = len(self.buffer) // self.seq_len
        if whole:
            self._write(self.buffer[: whole * self.seq_len].reshape(whole, self.seq_len))
        self.writer.finalize()
        if not self.sequences:
            return datasets.Dataset.from_dict({"input_ids": []}, features=self.features)
        return datasets.Dataset.from_file(str(self.path))
