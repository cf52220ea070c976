"""Documents -> a data folder: read, count and skip what is no text, tokenize, pack.

Packing is concatenate-and-chunk with the end-of-text token behind each document. The folder holds
an Arrow dataset of fixed-length sequences with train and validation splits, a tokenizer that
`AutoTokenizer.from_pretrained` loads, and prepared.json.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from ds_local.data.dataset import FORMAT
from ds_local.errors import DataError

PIECE = (
    100_000  # characters tokenized at once: a 50 MB line must not need 50 MB of tokenizer lattice
)
HELD_BACK = 256  # sequences written last, so that the validation split can have some if no document was held out


class Document(NamedTuple):
    name: str
    text: str


def check_same_tokenizer(model: str | Path, data: str | Path) -> bool:
    """Does a model folder have the tokenizer of the data? False when it has none.

    Raises:
        DataError: when it has another one: pretrained weights would take every token for something
            else.
    """
    if not any(
        Path(model, name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return False
    own, prepared = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (model, data))
    if own != prepared:
        raise DataError(
            f"the pretrained model in {model} has another tokenizer ({len(own)} tokens) than the data ({len(prepared)} tokens); "
            f"prepare the data with --tokenizer {model}"
        )
    return True


# --- sources
# --------------------------------------------------------------------------------------------------------------


def documents(sources: Sequence[str], skipped: Counter[str]) -> Iterator[Document]:
    """All documents of the sources, in a fixed order; what is no text is counted in `skipped` by
    reason.

    Args:
        sources: "python-stdlib", "hub:NAME" or "hub:NAME:CONFIG" (the train split of a Hugging Face
            dataset), files or folders. A .jsonl line or parquet row is a document (its "text"
            field); any other file is one document.

    Raises:
        DataError: when a source does not exist or has no text field.
    """
    for source in sources:
        if source == "python-stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            yield from _files(root, sorted(_stdlib_files(root)), skipped)
        elif source.startswith("hub:"):
            yield from _hub(source.removeprefix("hub:"), skipped)
        elif Path(source).exists():
            path = Path(source)
            yield from _files(
                path,
                sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path],
                skipped,
            )
        else:
            raise DataError(
                f"source {source!r} does not exist; give a file, a folder, python-stdlib or hub:NAME"
            )


def _stdlib_files(root: Path) -> Iterator[Path]:
    leave_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - leave_out)
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _files(root: Path, paths: Iterable[Path], skipped: Counter[str]) -> Iterator[Document]:
    for path in paths:
        name = path.relative_to(root) if path != root else path.name  # the same on every machine
        if path.suffix == ".jsonl":
            rows = _jsonl(path, skipped)
        elif path.suffix == ".parquet":
            rows = _rows(datasets.Dataset.from_parquet(str(path), keep_in_memory=True), str(path))
        else:
            rows = iter([path.read_bytes()])
        for number, content in enumerate(rows):
            text = _text(content, skipped)
            if text is not None:
                yield Document(f"{name}:{number}", text)


def _jsonl(path: Path, skipped: Counter[str]) -> Iterator[str | bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)["text"]
            except UnicodeDecodeError:
                skipped["invalid UTF-8"] += 1
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    f'{path}, line {number}: every line must be a JSON object with a "text" field ({error})'
                ) from error


def _hub(name: str, skipped: Counter[str]) -> Iterator[Document]:
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
    except Exception as error:  # whatever the hub client raises: offline, unknown name, gated
        raise DataError(f"cannot load the dataset {name!r}: {error}") from error
    for number, content in enumerate(_rows(rows, name)):
        text = _text(content, skipped)
        if text is not None:
            yield Document(f"{name}:{number}", text)


def _rows(rows: Any, name: str) -> Iterator[str]:
    for row in rows:
        if "text" not in row:
            raise DataError(f'{name} has the columns {", ".join(row)}; a "text" column is needed')
        yield row["text"]


def _text(content: str | bytes | None, skipped: Counter[str]) -> str | None:
    """The text of a document, or None when it is none; then the reason is counted."""
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped["invalid UTF-8"] += 1
            return None
    if not isinstance(content, str) or not content.strip():
        skipped["empty"] += 1
        return None
    if "\0" in content:
        skipped["NUL bytes"] += 1
        return None
    return content


# --- tokenizers
# -----------------------------------------------------------------------------------------------------------


def make_tokenizer(spec: str, texts: Iterable[Document]) -> PreTrainedTokenizerBase:
    """A tokenizer from its specification.

    Args:
        spec: "sentencepiece:SIZE" trains a BPE model with byte fallback on `texts`; anything else
            is a Hugging Face tokenizer folder or hub name.

    Raises:
        DataError: when it cannot be trained or loaded, or has no end-of-text token.
    """
    kind, _, size = spec.partition(":")
    if kind == "sentencepiece":
        if not size.isdigit() or int(size) < 300:
            raise DataError(
                f"tokenizer {spec!r}: give sentencepiece:SIZE with a size of at least 300, for example sentencepiece:4096"
            )
        return _train_sentencepiece(int(size), texts)
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the tokenizer {spec!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {spec!r} has no end-of-text token to separate documents with"
        )
    return tokenizer


def _train_sentencepiece(size: int, texts: Iterable[Document]) -> PreTrainedTokenizerBase:
    import sentencepiece

    lines = (
        line
        for document in texts
        for line in document.text.split("\n")
        if line and len(line) < 4096
    )
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(lines, 1_000_000),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,  # one thread: the same text gives the same model
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"cannot train a tokenizer of {size} pieces on this text: {error}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(
            folder, legacy=False, add_prefix_space=False, add_bos_token=False
        )


# --- preparing
# ------------------------------------------------------------------------------------------------------------


def prepare(
    sources: Sequence[str],
    tokenizer_spec: str,
    seq_len: int,
    output: str | Path,
    validation_share: float = 0.02,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the data folder `output`; an existing one is replaced only when the new one is
    complete.

    Args:
        sources: see `documents`.
        tokenizer_spec: see `make_tokenizer`.
        seq_len: tokens in a sequence.
        validation_share: share of the documents (of a long one: of its pieces) held out; at least
            one sequence is.

    Returns:
        What is in prepared.json: counts of documents and sequences, what was skipped and why, a
        fingerprint.

    Raises:
        DataError: when a source or the tokenizer cannot be used, or there is too little text.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(tokenizer_spec, documents(sources, Counter()))
    skipped: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        new = Path(scratch, "new")
        packers = {
            split: _Packer(Path(scratch, f"{split}.arrow"), tokenizer, seq_len)
            for split in ("train", "validation")
        }
        shown = tqdm(
            documents(sources, skipped),
            desc="tokenizing",
            unit=" documents",
            disable=not progress,
            mininterval=1,
        )
        num_documents = 0
        for document in shown:
            num_documents += 1
            for start in range(0, len(document.text), PIECE):
                split = (
                    "validation"
                    if _held_out(f"{document.name}:{start}", validation_share)
                    else "train"
                )
                packers[split].add(
                    document.text[start : start + PIECE], ends=start + PIECE >= len(document.text)
                )
        if not packers["train"].available:  # the only document was held out
            packers = {"train": packers["validation"], "validation": packers["train"]}
        if not packers["validation"].available:  # few documents: hold out the end of the last one
            packers["train"].give_last_to(packers["validation"], validation_share)
        splits = {split: packer.finish() for split, packer in packers.items()}
        if any(len(split) == 0 for split in splits.values()):
            raise DataError(
                f"the sources give {packers['train'].tokens} tokens, too few for train and validation sequences of {seq_len}; "
                f"add text or lower --seq-len. Skipped: {dict(skipped) or 'nothing'}"
            )
        datasets.disable_progress_bars()
        datasets.DatasetDict(splits).save_to_disk(new)
        tokenizer.save_pretrained(new / "tokenizer")
        facts = {
            "format": FORMAT,
            "sources": list(sources),
            "tokenizer": tokenizer_spec,
            "seq_len": seq_len,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "documents": num_documents,
            "skipped": dict(skipped),
            "tokens": sum(p.tokens for p in packers.values()),
            "bytes": {split: packer.num_bytes for split, packer in packers.items()},
            "sequences": {split: len(rows) for split, rows in splits.items()},
            "fingerprint": hashlib.sha256(
                "".join(packers[s].digest.hexdigest() for s in sorted(packers)).encode()
            ).hexdigest(),
        }
        (new / "prepared.json").write_text(json.dumps(facts, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        new.rename(output)
    return facts


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
        self.tokens = self.sequences = self.num_bytes = 0
        self.digest = hashlib.sha256()

    def add(self, text: str, ends: bool) -> None:
        """Take a piece of a document; `ends`: it is the last one."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ends:
            ids = [*ids, self.tokenizer.eos_token_id]
        if max(ids) >= len(self.tokenizer):
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
