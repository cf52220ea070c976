"""Bad input ends in one sentence of ours that names what is bad."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ds_local.errors import DsLocalError


@contextmanager
def one_sentence(*said: str, error: type[DsLocalError] = DsLocalError) -> Iterator[None]:
    """The block raises `error`, in a line with all of `said` in it."""
    with pytest.raises(error) as found:
        yield
    text = str(found.value)
    assert "\n" not in text
    assert 20 < len(text) < 600
    for part in said:
        assert part in text, text


def assert_one_sentence(error: object, *words: str) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert "Traceback" not in text
    assert len(text) < 500, text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
