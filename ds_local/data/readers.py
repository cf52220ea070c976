"""What is in a source file: rows of text, JSON, JSON lines, tables and the hub, one after another.

No file is held whole: lines, entries, batches of rows and pieces of plain text are read as they
come, from compressed files too.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ds_local.data.compression import Input, endings
from ds_local.data.fields import Malformed, present
from ds_local.data.json_values import json_values
from ds_local.errors import DataError, first_line

# characters tokenized at once: a 50 MB line must not need 50 MB of tokenizer lattice
PIECE = 100_000
_PIECES_HELD = 100  # of a plain file; a longer one is read twice
_BATCH = 1000  # rows of a table read at once, at most
_FIRST_LINE = 1 << 20  # bytes by which JSON lines are told from one object
_LONGEST_FIELD = 1 << 28  # characters of a table's field: an open quote must not swallow a disk


class Row(NamedTuple):
    """`where`: "line 3"; `value`: an object with fields, or else `Malformed`."""

    where: str
    value: Any


def json_lines(file: Input, fields: Sequence[str]) -> Iterator[Row]:
    """An object a line."""
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError:
                value = {fields[0]: line}  # is counted as no UTF-8
            except (ValueError, RecursionError) as error:
                value = Malformed(
                    f'is no JSON ({first_line(error)}); every line must be an object with a "'
                    f'{fields[0]}" field'
                )
            yield Row(f"line {number}", value)


def json_file(file: Input, fields: Sequence[str]) -> Iterator[Row]:
    """A list of objects or strings, one object, or an object a line."""
    with file.open() as stream:
        first = stream.readline(_FIRST_LINE)
    try:
        by_line = not first.lstrip().startswith(b"[") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        by_line = False
    if by_line:
        yield from json_lines(file, fields)
        return
    with file.open() as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
        try:
            for number, value in enumerate(json_values(text)):
                yield Row(
                    f"entry {number}", {fields[0]: value} if isinstance(value, str) else value
                )
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.path} is no JSON: {first_line(error)}") from error


def _table(delimiters: str) -> Callable[[Input, Sequence[str]], Iterator[Row]]:
    """The reader of tables as text, with a header; of the delimiters the one that the header has
    around a field that is asked for."""

    def rows(file: Input, fields: Sequence[str]) -> Iterator[Row]:
        csv.field_size_limit(_LONGEST_FIELD)
        with file.open() as stream:
            header = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
            lines = itertools.islice(header, 100)
            first = next((line for line in lines if line.strip()), "")
        if not first:
            return
        for delimiter in delimiters:
            columns = next(csv.reader([first], delimiter=delimiter), [])
            if present(fields, columns):
                break
        else:
            raise _no_column(file.path, next(csv.reader([first], delimiter=delimiters[0]), []))
        with file.open() as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
            yield from _table_rows(text, delimiter)

    return rows


def _table_rows(text: io.TextIOWrapper, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Row(f"line {line}", Malformed(f"is no row of a table ({first_line(error)})"))
            continue
        if values is None:
            return
        if not values:
            continue
        if columns is None:
            columns = values
        elif len(values) != len(columns):
            bad = Malformed(f"has {len(values)} fields, the header has {len(columns)}")
            yield Row(f"line {line}", bad)
        else:
            yield Row(f"line {line}", dict(zip(columns, values, strict=True)))


def _no_column(path: Path, columns: Sequence[str]) -> DataError:
    names = ", ".join(columns)[:200] or "none"
    return DataError(
        f"{path} has the columns {names}; name the one with text with --text-field, or leave the "
        "file out with --skip"
    )


def parquet(file: Input, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, of the column alone that is needed."""
    if endings(file.path)[1]:  # it is read from its end
        with file.open() as stream, tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(stream, plain)
            yield from _parquet_rows(plain, file, fields)
    else:
        with file.open() as stream:
            yield from _parquet_rows(stream, file, fields)


def _parquet_rows(stream: Any, file: Input, fields: Sequence[str]) -> Iterator[Row]:
    try:
        with pq.ParquetFile(stream, buffer_size=1 << 20) as table:
            columns = table.schema_arrow.names
            field = present(fields, columns)
            if field is None:
                raise _no_column(file.path, columns)
            done, total = 0, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=_BATCH, columns=[field]):
                for number, row in enumerate(batch.to_pylist(), start=done):
                    yield Row(f"row {number}", row)
                done += batch.num_rows
                file.share_read = done / total
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{file.path} is no parquet file: {first_line(error)}") from error


READERS: dict[str, Callable[[Input, Sequence[str]], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": _table(",;"),
    ".tsv": _table("\t"),
    ".parquet": parquet,
}


def plain_text(file: Input) -> Iterator[str]:
    """The pieces of a file that is one text, once it was found to be text to its end.

    Raises:
        NoText: when it is not.
    """
    held, reason, count = [], "empty", 0
    try:
        for piece in _pieces(file):
            if "\0" in piece:
                raise NoText("NUL bytes")
            reason = reason if not piece.strip() else ""
            count += 1
            if count <= _PIECES_HELD:
                held.append(piece)
    except UnicodeDecodeError as error:
        raise NoText("invalid UTF-8") from error
    if reason:
        raise NoText(reason)
    yield from held if count <= _PIECES_HELD else _pieces(file)


def _pieces(file: Input) -> Iterator[str]:
    with file.open() as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        while piece := text.read(PIECE):
            yield piece


class NoText(ValueError):
    """What cannot be read as text, and is left out; the message is the reason."""


def checked_text(content: str | bytes | None) -> str:
    """The text of a row. Raises NoText."""
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        if content is None or not content.strip():
            raise NoText("empty")
        content.encode()  # fails for half a surrogate pair, as JSON can have
    except UnicodeError as error:
        raise NoText("invalid UTF-8") from error
    if "\0" in content:
        raise NoText("NUL bytes")
    return content


def hub_rows(name: str) -> Iterator[Row]:
    """Rows of the train split of a Hugging Face dataset, "NAME" or "NAME:CONFIG"."""
    path, _, config = name.partition(":")
    try:
        rows = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
    except Exception as error:  # whatever the hub client raises: offline, unknown name, gated
        raise DataError(f"cannot load the dataset {name!r}: {first_line(error)}") from error
    for number in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:  # the same, on the way
            raise DataError(
                f"cannot read on in the dataset {name!r}: {first_line(error)}"
            ) from error
        if row is None:
            return
        yield Row(f"row {number}", row)
