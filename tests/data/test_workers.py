"""Any number of processes gives the same ids, holds few texts, and never waits for ever."""

import os
import signal

import numpy as np
import pytest
from sentences import one_sentence
from test_corpus import letters_alone, tokenizer, words  # noqa: F401 - a fixture

from ds_local.data import workers
from ds_local.data.tokenizers import encode, load_tokenizer
from ds_local.data.workers import encoded
from ds_local.errors import DataError


def texts(count):
    return [(number, words(number % 7 * 20, number)) for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ids_come_in_the_order_of_the_texts(tokenizer, monkeypatch, count):  # noqa: F811
    monkeypatch.setattr(workers, "_BATCH", 300)
    loaded = load_tokenizer(tokenizer)
    found = list(encoded(texts(60), loaded, count))
    assert [key for key, _ in found] == list(range(60))
    for (_, text), (_, ids) in zip(texts(60), found, strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == encode(loaded, text)


@pytest.mark.parametrize("count", [1, 2])
def test_no_more_texts_are_read_than_are_under_way(tokenizer, monkeypatch, count):  # noqa: F811
    monkeypatch.setattr(workers, "_BATCH", 100)
    read = []

    def long():
        for key, text in texts(300):
            read.append(len(text))
            yield key, text

    found = encoded(long(), load_tokenizer(tokenizer), count)
    next(found)
    largest = 100 + 6 * 20 * 8
    assert sum(read) <= (1 + workers._AHEAD * count) * largest
    found.close()


def test_a_text_without_ids_is_named_from_any_process(tmp_path):
    letters_alone(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for count in (1, 2):
        with one_sentence("cannot take 'aab'", error=DataError):
            list(encoded([(0, "a"), (1, "aab")], loaded, count))


def test_a_process_that_was_ended_is_noticed(tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(workers, "_work", _end)
    with one_sentence("one of the 2 processes was ended", "fewer --workers", error=DataError):
        list(encoded(texts(20), load_tokenizer(tokenizer), 2))


def _end(pieces):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_ends_with_its_parent():
    grandchild, end = os.pipe()
    child = os.fork()
    if not child:  # its own child waits for it to end, and closes the pipe with itself
        if not os.fork():
            workers._end_with(os.getppid())
        os._exit(0)
    os.close(end)
    os.waitpid(child, 0)
    assert os.read(grandchild, 1) == b""


def test_the_setting_of_the_library_is_put_back(tokenizer, monkeypatch):  # noqa: F811
    name = "TOKENIZERS_PARALLELISM"
    loaded = load_tokenizer(tokenizer)
    for before in (None, "true"):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        found = encoded(texts(3), loaded)
        next(found)
        assert os.environ[name] == "false"
        list(found)
        assert os.environ.get(name) == before
