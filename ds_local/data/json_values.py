"""Values of a JSON file one by one: a list of any length is never held whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 1 << 20  # characters read at once
_LONGEST = 1 << 28  # characters of a value
_SPACE = re.compile(r"[ \t\r\n]*")


def json_values(text: TextIO) -> Iterator[Any]:
    """The entries of a list, or else the values that follow one another.

    Raises:
        ValueError: where it is no JSON, or a value is longer than 256 Mi characters.
    """
    reader = _Reader(text)
    in_list = reader.peek() == "["
    if in_list:
        reader.take()
    following = False
    while (sign := reader.peek()) and not (in_list and sign == "]"):
        if in_list and following:
            if sign != ",":
                raise ValueError(f"a comma is missing before {reader.excerpt()!r}")
            reader.take()
        yield reader.value()
        following = True
    if in_list:
        if not sign:
            raise ValueError("it ends in the middle of a list")
        reader.take()
        if reader.peek():
            raise ValueError(f"more follows behind its list: {reader.excerpt()!r}")


class _Reader:
    """A window on the text, moved along and made wider where a value needs it."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._window, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next sign that is no space, "" at the end."""
        while True:
            self._at = _SPACE.match(self._window, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._window) or not self._widen():
                return self._window[self._at : self._at + 1]

    def take(self) -> None:
        self._at += 1

    def excerpt(self) -> str:
        return self._window[self._at : self._at + 20]

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._window, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or len(self._window) - error.pos < 16
                if not cut or not self._widen():
                    raise ValueError(f"{error.msg} at {self.excerpt()!r}") from error
            else:
                if len(self._window) - end > 3 or not self._widen():  # a number may go on: 1 e+3
                    self._at = end
                    return value

    def _widen(self) -> bool:
        """Read on. False at the end of the text."""
        left = len(self._window) - self._at
        if left > _LONGEST:
            raise ValueError(f"a value is longer than {_LONGEST} characters: {self.excerpt()!r}")
        more = self._text.read(max(_CHUNK, left))
        if more:
            self._window, self._at = self._window[self._at :] + more, 0
        return bool(more)
