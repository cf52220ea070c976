"""A tokenizer trained on the sources themselves."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from ds_local.data.documents import Document
from ds_local.errors import DataError, first_line

_LONGEST_LINE = 4096  # that training takes
_MOST_LINES = 1_000_000
_MOST_CHARACTERS = 1 << 27
SAMPLE = 1 << 30  # bytes of the sources that are looked at for it; of more, documents are drawn


def train_sentencepiece(
    size: int, texts: Iterable[Document], num_bytes: int | None = None
) -> PreTrainedTokenizerBase:
    """A BPE model with byte fallback. The same text gives the same model.

    Args:
        texts: all documents; when they have more than `SAMPLE` bytes, some of all of them are used.
        num_bytes: of all documents, None when nobody knows.

    Raises:
        DataError: when there is too little text.
    """
    import sentencepiece

    model = BytesIO()
    failed: list[DataError] = []

    def told(lines: Iterator[str]) -> Iterator[str]:
        """sentencepiece makes another error of every error."""
        try:
            yield from lines
        except DataError as error:
            failed.append(error)
            raise

    share = min(1.0, SAMPLE / num_bytes) if num_bytes else 1.0
    drawn = (one for one in texts if share == 1.0 or is_drawn(f"{one.name} is drawn", share))
    lines = (line for line in lines_of(drawn) if line and len(line) < _LONGEST_LINE)
    first = next(lines, None)
    if first is None:
        raise DataError(
            f"the sources have no line of less than {_LONGEST_LINE} characters to train a "
            "tokenizer on; break the lines, or give an existing --tokenizer"
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=told(_some_of(itertools.chain([first], lines))),
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
        if failed:
            raise failed[0] from error
        raise DataError(
            f"cannot train a tokenizer of {size} pieces on this text: {first_line(error)}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(
            folder, legacy=False, add_prefix_space=False, add_bos_token=False
        )


def is_drawn(name: str, share: float) -> bool:
    """Is something among the share that is drawn? It depends on its name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < share * 2**32


def lines_of(documents: Iterable[Document]) -> Iterator[str]:
    """The lines of documents, which may come in pieces. What is too long for training is cut."""
    begun = ""
    for document in documents:
        *lines, begun = (begun + document.text).split("\n")
        yield from lines
        begun = begun[:_LONGEST_LINE]
        if document.ends:
            yield begun
            begun = ""


def _some_of(lines: Iterator[str]) -> Iterator[str]:
    """The first ones, as many as training has room for."""
    left = _MOST_CHARACTERS
    for line in itertools.islice(lines, _MOST_LINES):
        left -= len(line)
        if left < 0:
            return
        yield line
