"""Texts -> token ids, by one process or several, in the order of the texts.

The ids of a text depend on the text alone, so the number of processes changes nothing but the time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_local.data.tokenizers import encode_all
from ds_local.errors import DataError

T = TypeVar("T")

_BATCH = 1 << 18  # characters handed over at once
_AHEAD = 4  # batches of each process that are under way


def encoded(
    texts: Iterable[tuple[T, str]], tokenizer: PreTrainedTokenizerBase, workers: int = 1
) -> Iterator[tuple[T, np.ndarray]]:
    """(key, token ids) of all (key, text), without special tokens. At most `_AHEAD` batches a
    process are held.

    Raises:
        DataError: when the tokenizer has no ids for a text, or a process ended.
    """
    batches = _batches(texts)
    with _one_thread():
        if workers == 1:
            for keys, pieces in batches:
                yield from zip(keys, _ids(tokenizer, pieces), strict=True)
            return
        # forked before there are threads; each holds a copy of the tokenizer
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, _begin, (tokenizer, os.getpid())) as pool:
            try:
                yield from _in_order(pool, batches, workers * _AHEAD)
            except BrokenProcessPool as error:
                raise DataError(
                    f"one of the {workers} processes was ended, perhaps for want of memory; "
                    "give fewer --workers"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[tuple[list[T], list[str]]], ahead: int
) -> Iterator[tuple[T, np.ndarray]]:
    under_way: deque[tuple[list[T], Future[list[np.ndarray]]]] = deque()
    for keys, pieces in batches:
        under_way.append((keys, pool.submit(_work, pieces)))
        if len(under_way) == ahead:
            oldest, found = under_way.popleft()
            yield from zip(oldest, found.result(), strict=True)
    for keys, found in under_way:
        yield from zip(keys, found.result(), strict=True)


def _batches(texts: Iterable[tuple[T, str]]) -> Iterator[tuple[list[T], list[str]]]:
    keys: list[T] = []
    pieces: list[str] = []
    size = 0
    for key, text in texts:
        keys.append(key)
        pieces.append(text)
        size += len(text)
        if size >= _BATCH:
            yield keys, pieces
            keys, pieces, size = [], [], 0
    if keys:
        yield keys, pieces


_here: dict[str, Any] = {}  # the tokenizer of this process


def _begin(tokenizer: PreTrainedTokenizerBase, parent: int) -> None:
    _here["tokenizer"] = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A process whose parent was killed would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(pieces: list[str]) -> list[np.ndarray]:
    return _ids(_here["tokenizer"], pieces)


def _ids(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> list[np.ndarray]:
    """As narrow as the tokenizer's ids."""
    size, dtype = len(tokenizer), id_type(tokenizer)
    found = []
    for one in encode_all(tokenizer, pieces):
        ids = np.asarray(one, dtype=np.int64)
        if ids.max(initial=0) >= size:
            raise DataError(f"the tokenizer gave the id {ids.max()} but says it has {size} tokens")
        found.append(ids.astype(dtype))
    return found


def id_type(tokenizer: PreTrainedTokenizerBase) -> type[np.generic]:
    """Wide enough for all ids, added tokens included."""
    return np.uint16 if len(tokenizer) <= 2**16 else np.int32


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tokenizers library would start a thread for each core in each process."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
