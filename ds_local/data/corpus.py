"""Documents -> a data folder: tokenize, pack, hold out a part.

Packing is concatenate-and-chunk with the end-of-text token behind each document. The folder holds
an Arrow dataset of fixed-length sequences with train and validation splits, a tokenizer that
`AutoTokenizer.from_pretrained` loads, prepared.json, and a list of its files with checksums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ds_local.data.dataset import FORMAT, KIND
from ds_local.data.documents import Reading, printable
from ds_local.data.fields import TEXT_FIELDS, Chat, plain_chat
from ds_local.data.left_out import Skipped
from ds_local.data.mixture import Mixture
from ds_local.data.sources import Source, parse_source, parse_sources
from ds_local.data.tokenizers import chat_of, fingerprint, make_tokenizer, save_tokenizer
from ds_local.data.way import Way
from ds_local.data.workers import encoded, id_type
from ds_local.errors import DataError
from ds_local.outputs import new_folder

_LENGTHS = range(2, 2**24)  # of a sequence: two tokens have one to predict
_WORKERS = range(1, 1025)


def prepare(
    sources: Sequence[str],
    tokenizer_spec: str,
    seq_len: int,
    output: str | Path,
    validation_share: float = 0.02,
    progress: bool = True,
    skip: Sequence[str] = (),
    *,
    validation_sources: Sequence[str] = (),
    text_fields: Sequence[str] = TEXT_FIELDS,
    max_malformed: float = 0,
    document_mask: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Write the data folder `output`; an existing one of ours is replaced when the new one is
    complete, anything else is left alone.

    Args:
        sources: each [NAME=]PLACE[@WEIGHT]; for places see `sources.documents`, for weights
            `order.Order`.
        tokenizer_spec: see `make_tokenizer`.
        seq_len: tokens in a sequence.
        validation_share: share of the documents (of a long one: of its pieces) held out; at least
            one sequence is.
        skip: patterns of files in folders to leave out.
        validation_sources: places of validation text; then nothing is held out.
        text_fields: of a row, the first that it has holds its text, see `fields.text_of`.
        max_malformed: rows that may be malformed and are left out; below 1 a share of all rows.
        document_mask: batches tell documents apart, so that no document attends to another.
        workers: processes that tokenize; they change nothing but the time.

    Returns:
        What is in prepared.json: counts of documents and sequences, what was skipped and why, a
        fingerprint.

    Raises:
        DataError: when a source or the tokenizer cannot be used, there is too little text, or
            `output` is not ours to replace or cannot be written.
    """
    _check_numbers(seq_len, validation_share, max_malformed, workers)
    train, validation = parse_sources(sources), _validation(validation_sources)
    _check_apart([one.place for one in train + validation], Path(output))
    _check_own([one.place for one in train], [one.place for one in validation])

    def way(label: str, render: Chat = plain_chat) -> Way:
        reading = Reading(Skipped(max_malformed=max_malformed), text_fields, render)
        return Way(train, validation, skip, reading, label if progress else "")

    with new_folder(output, KIND, DataError) as new:
        with way("looking for a vocabulary") as first:
            tokenizer = make_tokenizer(tokenizer_spec, first.documents(), first.num_bytes)
        end = tokenizer.eos_token_id
        mixture = Mixture(train, new.parent, id_type(tokenizer), seq_len, end, document_mask)
        with way("tokenizing", chat_of(tokenizer)) as last:
            for piece, ids in encoded(last.pieces(validation_share), tokenizer, workers):
                mixture.add(piece, ids)
        if not any(packer.of_text for packer in mixture.packers):
            raise DataError(f"the tokenizer {tokenizer_spec!r} gives no tokens for this text")
        skipped = last.reading.skipped
        if not validation:
            mixture.balance(validation_share)
        splits = _filled(mixture, skipped, seq_len)
        datasets.disable_progress_bars()
        datasets.DatasetDict(splits).save_to_disk(new)
        save_tokenizer(tokenizer, new / "tokenizer")
        facts = {
            "format": FORMAT,
            "sources": [one.place for one in train],
            "validation_sources": [one.place for one in validation],
            "tokenizer": tokenizer_spec,
            "tokenizer_fingerprint": fingerprint(tokenizer),
            "seq_len": seq_len,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "documents": last.num_documents,
            "skipped": dict(skipped.counts),
            "skipped_names": dict(skipped.names),
            "tokens": sum(mixture.count("tokens").values()),
            "bytes": mixture.count("num_bytes"),
            "sequences": {split: len(rows) for split, rows in splits.items()},
            "mixture": mixture.facts(),
            "document_mask": document_mask,
            "fingerprint": mixture.fingerprint("document mask" * document_mask),
        }
        (new / "prepared.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _filled(mixture: Mixture, skipped: Skipped, seq_len: int) -> dict[str, datasets.Dataset]:
    """Both splits. Raises DataError when there are no sequences of one."""
    splits = mixture.finish()
    if any(len(split) == 0 for split in splits.values()):
        counts = ", ".join(
            f"{tokens} tokens for {split}" for split, tokens in mixture.count("tokens").items()
        )
        raise DataError(
            f"the sources give {counts}, too few for train and validation sequences of {seq_len} "
            f"(left out: {skipped or 'nothing'}); add text or lower --seq-len"
        )
    return splits


def _validation(given: Sequence[str]) -> list[Source]:
    """Sources of validation text alone, which have no weights."""
    found = [parse_source(one) for one in given]
    for source in found:
        if source.weight is not None:
            raise DataError(
                f"the validation source {source.place!r} has a weight; all of it is evaluated, so "
                "leave the weight out"
            )
    return [source._replace(name=f"validation {source.name}") for source in found]


def _check_numbers(
    seq_len: int, validation_share: float, max_malformed: float, workers: int
) -> None:
    if seq_len not in _LENGTHS:
        raise DataError(
            f"--seq-len is {seq_len}; give from {_LENGTHS[0]} to {_LENGTHS[-1]:,} tokens"
        )
    if not 0 <= validation_share < 1:  # NaN too
        raise DataError(
            f"--validation-share is {validation_share}; give at least 0 and less than 1, for "
            "example 0.02"
        )
    if not (0 <= max_malformed < 1 or (max_malformed > 0 and float(max_malformed).is_integer())):
        raise DataError(
            f"--max-malformed is {max_malformed}; give a number of rows, or a share of them below "
            "1, for example 0.01"
        )
    if workers not in _WORKERS:
        raise DataError(
            f"--workers is {workers}; give from {_WORKERS[0]} to {_WORKERS[-1]:,} processes"
        )


def _check_apart(sources: Sequence[str], output: Path) -> None:
    """No source may be in what is replaced, nor the output among what is read."""
    place = Path(os.path.realpath(output))
    if printable(place) != str(place):
        raise DataError(
            f"--output {printable(place)!r} has bytes that are no UTF-8, which the readers of its "
            "files do not take; choose another name"
        )
    for source in sources:
        path = Path(os.path.realpath(source))
        if not source or source.startswith("hub:") or not os.path.exists(path):
            continue
        if path == place or path in place.parents or place in path.parents:
            raise DataError(
                f"--output {output} and the source {source} are in one another; choose an --output "
                "outside of all sources"
            )


def _check_own(train: Sequence[str], validation: Sequence[str]) -> None:
    """What is trained on is no validation text."""
    places = {os.path.realpath(place) for place in train}
    for place in validation:
        if os.path.realpath(place) in places:
            raise DataError(
                f"{place} is a source and a validation source; give other text to one of them"
            )
