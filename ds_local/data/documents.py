"""Files -> documents, each with a name, in pieces where it is long."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_local.data.compression import Input, endings
from ds_local.data.fields import TEXT_FIELDS, Chat, Malformed, plain_chat, text_of
from ds_local.data.left_out import Skipped
from ds_local.data.readers import PIECE, READERS, NoText, Row, checked_text, hub_rows, plain_text
from ds_local.errors import DataError, first_line


class Document(NamedTuple):
    """A document, or a piece of one.

    `name`: of its file, the same on every machine, and its number there; `start`: characters of the
    document before it; `ends`: nothing of the document follows.
    """

    name: str
    text: str
    start: int = 0
    ends: bool = True


@dataclass
class Reading:
    """How sources are read, and what was left out on the way.

    Args:
        fields: of a row, the first that it has holds its text; see `fields.text_of`.
        render: makes text of the messages of a chat.
        on_bytes: told the bytes of files that have been read since it was told last.
    """

    skipped: Skipped = field(default_factory=Skipped)
    fields: Sequence[str] = TEXT_FIELDS
    render: Chat = plain_chat
    on_bytes: Callable[[int], object] = lambda count: None
    _names: dict[str, str] = field(default_factory=dict)  # real path -> name of a file

    def name_of(self, path: Path, root: Path) -> str:
        """Of a file of the source whose place is `root`. One that is met again, by another place or
        a link, keeps its name: whether its documents are held out depends on that."""
        name = printable(path.relative_to(root) if path != root else path.name)
        return self._names.setdefault(os.path.realpath(path), name)


def documents_of(root: Path, files: Iterable[Path], reading: Reading) -> Iterator[Document]:
    """All documents of the files of a source, whose place is `root`."""
    for path in files:
        short = reading.name_of(path, root)
        try:
            file = Input(path)
            read = READERS.get(endings(path)[0])
            if read is None:
                found = _plain(file, short, path == root, reading.skipped)
            else:
                rows = read(file, reading.fields)
                found = _of_rows(rows, short, str(path), reading)
            told = 0
            for document in found:
                yield document
                if file.bytes_read > told:
                    reading.on_bytes(file.bytes_read - told)
                    told = file.bytes_read
            reading.on_bytes(file.size - told)
        except OSError as error:
            raise unreadable(path, error) from error


def hub_documents(name: str, reading: Reading) -> Iterator[Document]:
    """All documents of a Hugging Face dataset."""
    return _of_rows(hub_rows(name), name, name, reading)


def _plain(file: Input, short: str, alone: bool, skipped: Skipped) -> Iterator[Document]:
    """The only document of a file of plain text; a source by itself must be text."""
    try:
        start = 0
        for piece, following in _with_next(plain_text(file)):
            yield Document(f"{short}:0", piece, start, following is None)
            start += len(piece)
    except NoText as error:
        if alone and str(error) != "empty":
            raise DataError(f"{file.path} is no UTF-8 text ({error}); convert it") from error
        skipped.add(str(error), short)


def _of_rows(rows: Iterable[Row], short: str, long: str, reading: Reading) -> Iterator[Document]:
    number = -1
    for number, row in enumerate(rows):
        reading.skipped.rows += 1
        name = f"{short}:{number}"
        try:
            text = checked_text(text_of(row.value, reading.fields, reading.render))
        except Malformed as error:
            reading.skipped.malformed(f"{long}, {row.where}", str(error))
        except NoText as error:
            reading.skipped.add(str(error), name)
        else:
            for start in range(0, len(text), PIECE):
                end = start + PIECE
                yield Document(name, text[start:end], start, end >= len(text))
    if number < 0:
        reading.skipped.add("empty", short)


def _with_next(pieces: Iterator[str]) -> Iterator[tuple[str, str | None]]:
    """Each piece and the one behind it, None behind the last."""
    one, other = itertools.tee(pieces)
    next(other, None)
    return zip(one, itertools.chain(other, [None]), strict=False)


def printable(path: Path | str) -> str:
    """A name that may have bytes that are no UTF-8."""
    return str(path).encode("utf-8", "replace").decode()


def unreadable(path: Any, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or first_line(error)}")


def same_name(name: str) -> str:
    """A document's name as it would be if its rows were kept as uncompressed JSON lines: whether
    it is held out does not depend on the form of its file."""
    short, _, number = name.rpartition(":")
    return f"{_plain_name(short)}:{number}"


@functools.lru_cache(maxsize=1024)
def _plain_name(short: str) -> str:
    path = Path(short)
    inside, packed = endings(path)
    if packed:
        path = path.with_suffix("")
    return str(path.with_suffix(".jsonl") if inside in READERS else path)
