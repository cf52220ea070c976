"""Tokenizers: made, loaded, compared by the ids they give, and written so that they load right."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from ds_local.data.documents import Document
from ds_local.data.fields import Chat, plain_chat
from ds_local.data.tokenizer_training import train_sentencepiece
from ds_local.errors import DataError, DsLocalError, first_line

_SIZES = range(300, 1_000_001)  # that can be trained
# end-of-text tokens that a vocabulary without a configuration may have
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
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


def make_tokenizer(
    spec: str, texts: Iterable[Document], num_bytes: int | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer from its specification.

    Args:
        spec: "sentencepiece:SIZE" trains a BPE model with byte fallback on `texts`; anything else
            is a Hugging Face tokenizer folder or hub name, or a folder with the vocab.json and
            merges.txt of a byte-level BPE.
        num_bytes: of all texts, None when nobody knows.

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
        return train_sentencepiece(int(size), texts, num_bytes)
    tokenizer = load_tokenizer(spec)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {spec!r} has no end-of-text token to separate documents with"
        )
    return tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or hub name, as anybody loads it. Raises DataError."""
    try:
        if files := _vocabulary_files(source):
            return _from_vocabulary(Path(source), *files)
        return AutoTokenizer.from_pretrained(source)
    except DataError:
        raise
    except Exception as error:  # a foreign file can fail in many ways
        raise DataError(
            f"cannot load the tokenizer {str(source)!r}: {first_line(error)}"
        ) from error


def _from_vocabulary(folder: Path, vocabulary: Path, merges: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, as GPT-2's, from the two files of its vocabulary."""
    tokens = json.loads(vocabulary.read_text())
    if not isinstance(tokens, dict) or not all(isinstance(i, int) for i in tokens.values()):
        raise DataError(f"{vocabulary} is no vocabulary: it must be a JSON object, token to id")
    if any(token.endswith("</w>") for token in tokens):
        raise DataError(
            f"{vocabulary} is of a BPE of words, with </w> at their ends; only byte-level BPE, as "
            "GPT-2's, is read from these two files: give a folder with tokenizer.json"
        )
    end = next((token for token in _ENDS if token in tokens), None)
    if end is None:
        raise DataError(f"{vocabulary} has no end-of-text token; add one of {', '.join(_ENDS)}")
    ids = sorted(tokens.values())
    if ids != list(range(len(ids))):
        raise DataError(
            f"{vocabulary} has {len(ids)} tokens, whose ids are not 0 to {len(ids) - 1}"
        )
    special = {f"{role}_token": end for role in ("unk", "bos", "eos")}
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(vocabulary, Path(place, "vocab.json"))
        shutil.copy(merges, Path(place, "merges.txt"))
        tokenizer = GPT2Tokenizer.from_pretrained(place, **special)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _vocabulary_files(source: str | Path) -> tuple[Path, Path] | None:
    """(vocab.json, merges.txt) of a folder that has nothing else of a tokenizer, or files that end
    so, as in gpt2-vocab.json."""
    folder = Path(source)
    if not folder.is_dir() or has_tokenizer(folder) or (folder / "config.json").exists():
        return None
    found = [sorted(folder.glob(pattern)) for pattern in ("*vocab.json", "*merges.txt")]
    return (found[0][0], found[1][0]) if all(len(files) == 1 for files in found) else None


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """How messages become text: by the tokenizer's chat template, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return plain_chat
    return functools.partial(tokenizer.apply_chat_template, tokenize=False)


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


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of texts, as `encode` gives them."""
    try:
        found = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    except Exception:  # one of them is to be named
        return [encode(tokenizer, text) for text in texts]
    return found["input_ids"]


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
