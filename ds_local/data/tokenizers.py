"""Tokenizers: made, loaded, compared by the ids they give, and written so that they load right."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from ds_local.data.readers import Document
from ds_local.errors import DataError, DsLocalError, first_line

_SIZES = range(300, 1_000_001)  # that can be trained
_LONGEST_LINE = 4096  # that training takes
# what tokenizers treat differently: spaces, line ends, scripts, digits, marks
_SAMPLE = (
    "Hello, world! It's 12345.67 o'clock",
    " a leading space, a trailing one ",
    "two  spaces,   three,\ttab,\r\nline\n\n\n  indented",
    "def f(x):\n    return x ** 2  # code_with_names\n",
    "na\u00efve caf\u00e9 \u2014 na\u0131\u0308ve cafe\u0301 \u00df \ufb01",
    "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587 \ud55c\uad6d\uc5b4 "
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 "
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u2603 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00a0\u200b\ufeff.",
    "<s> </s> <unk> <|endoftext|> \u2581under \u0120space",
)
_PROBED = 400  # tokens of the vocabulary that are compared too, evenly spaced


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
        if not re.fullmatch("[0-9]{1,9}", size) or int(size) not in _SIZES:
            raise DataError(
                f"tokenizer {spec!r}: give sentencepiece:SIZE with a size of at least {_SIZES[0]} "
                f"and at most {_SIZES[-1]:,}, for example sentencepiece:4096"
            )
        return _train_sentencepiece(int(size), texts)
    tokenizer = load_tokenizer(spec)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {spec!r} has no end-of-text token to separate documents with"
        )
    return tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or hub name, as anybody loads it. Raises DataError."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a foreign file can fail in many ways
        raise DataError(
            f"cannot load the tokenizer {str(source)!r}: {first_line(error)}"
        ) from error


def _train_sentencepiece(size: int, texts: Iterable[Document]) -> PreTrainedTokenizerBase:
    import sentencepiece

    model = BytesIO()
    lines = (
        line
        for document in texts
        for line in document.text.split("\n")
        if line and len(line) < _LONGEST_LINE
    )
    first = next(lines, None)
    if first is None:
        raise DataError(
            f"the sources have no line of less than {_LONGEST_LINE} characters to train a "
            "tokenizer on; break the lines, or give an existing --tokenizer"
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(itertools.chain([first], lines), 1_000_000),
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
            f"cannot train a tokenizer of {size} pieces on this text: {first_line(error)}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(
            folder, legacy=False, add_prefix_space=False, add_bos_token=False
        )


# --- the same ids?


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and of the ids that a sample of texts gets."""
    told = [sorted(tokenizer.get_vocab().items()), [_outcome(tokenizer, text) for text in _SAMPLE]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """The ids of a text, in data folders without special tokens around them.

    Raises:
        DataError: when the tokenizer has no ids for it.
    """
    try:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raises nothing more precise
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} cannot take {text[:40]!r}: {first_line(error)}"
        ) from error


def _outcome(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> Any:
    """The ids of a text, or why it has none."""
    try:
        return encode(tokenizer, text, special)
    except DataError as error:
        return first_line(error.__cause__ or error)


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """In what two tokenizers differ, "" when they give the same ids and the same text."""
    if len(one) != len(other):
        return f"it has {len(other)} tokens instead of {len(one)}"
    if one.eos_token_id != other.eos_token_id:
        return f"its end-of-text token is {other.eos_token_id} instead of {one.eos_token_id}"
    step = max(1, len(one) // _PROBED)
    for text in (*_SAMPLE, *(one.decode([i]) for i in range(0, len(one), step))):
        for special in (False, True):
            ids, theirs = (_outcome(tokenizer, text, special) for tokenizer in (one, other))
            if ids != theirs:
                return f"it gives {text[:40]!r} the ids {_few(theirs)} instead of {_few(ids)}"
        if isinstance(ids, list) and one.decode(ids) != other.decode(ids):
            return (
                f"it reads {_few(ids)} as {other.decode(ids)[:40]!r}, not {one.decode(ids)[:40]!r}"
            )
    return ""


def _few(ids: Any) -> str:
    return str(ids) if len(ids) <= 6 else f"{str(ids[:6])[:-1]}, ...]"


def has_tokenizer(folder: str | Path) -> bool:
    """Does a model folder have a tokenizer?"""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return any(Path(folder, name).is_file() for name in names)


def check_same_tokenizer(model: str | Path, data: str | Path) -> bool:
    """Does a model folder have the tokenizer of the data? False when it has none.

    Raises:
        DataError: when it has another one: pretrained weights would take every token for something
            else.
    """
    if not has_tokenizer(model):
        return False
    prepared = load_tokenizer(data)
    other = difference(prepared, load_tokenizer(model))
    if other and difference(prepared, _without_config(model)):
        raise DataError(
            f"the pretrained model in {model} has another tokenizer than the data: {other}; "
            f"prepare the data with --tokenizer {model}"
        )
    return True


def _without_config(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a folder's files describe, whatever the model beside them is: for some
    families of models, transformers takes the family's own tokenizer instead."""
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(model).iterdir():
            if path.is_file() and path.name != "config.json" and path.suffix != ".safetensors":
                shutil.copy(path, folder)
        return load_tokenizer(folder)


# --- writing


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: str | Path, error: type[DsLocalError] = DataError
) -> None:
    """Write a tokenizer so that `AutoTokenizer.from_pretrained` gives one with the same ids, also
    beside the config of a model whose family has a tokenizer of its own.

    Raises:
        error: when no way of writing it does.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    written = json.loads(path.read_text())
    found = ""
    for change in _AS_IT_IS, _BY_ITS_FILE, _NOT_THE_FAMILYS:
        path.write_text(json.dumps(written | change, indent=2) + "\n")
        try:
            other = difference(tokenizer, load_tokenizer(folder))
        except DataError as refused:
            other = str(refused)
        if not other:
            return
        found = found or other
    raise error(f"the tokenizer cannot be written so that it loads as it was: {found}")


_AS_IT_IS: dict[str, Any] = {}
_BY_ITS_FILE = {"tokenizer_class": "PreTrainedTokenizerFast"}
# an entry that names no code: transformers then takes the class that is named, not the family's
_NOT_THE_FAMILYS = _BY_ITS_FILE | {"auto_map": {"AutoTokenizer": [None, None]}}
