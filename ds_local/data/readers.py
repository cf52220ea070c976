"""What is in a source file: documents from text, JSON, JSON lines, Parquet tables and the hub."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ds_local.errors import DataError, first_line

NAMED = 5  # of the files left out for one reason


class Document(NamedTuple):
    name: str
    text: str


class Skipped:
    """What was left out: how much by reason, and the first few names."""

    def __init__(
        self, counts: Mapping[str, int] | None = None, names: Mapping[str, list[str]] | None = None
    ) -> None:
        self.counts: Counter[str] = Counter(counts)
        self.names: dict[str, list[str]] = defaultdict(list, names or {})

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        if len(self.names[reason]) < NAMED:
            self.names[reason].append(name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """For example: 7 empty (a.txt, b.txt, ...), 1 NUL bytes (c.png)."""
        return ", ".join(
            f"{count} {reason} ({', '.join(self.names[reason])}"
            f"{', ...' * (count > len(self.names[reason]))})"
            for reason, count in self.counts.items()
        )


def unreadable(path: Any, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or first_line(error)}")


def documents_of(root: Path, files: Iterable[Path], skipped: Skipped) -> Iterator[Document]:
    for path in files:
        short = path.relative_to(root) if path != root else path.name  # the same on every machine
        read = READERS.get(path.suffix.lower(), _whole)
        try:
            for number, content in enumerate(read(path)):
                text, reason = _text(content)
                if text is not None:
                    yield Document(f"{short}:{number}", text)
                elif path == root and read is _whole and reason != "empty":
                    raise DataError(f"{path} is no UTF-8 text ({reason}); convert it")
                else:
                    skipped.add(reason, f"{short}:{number}" if read is not _whole else str(short))
        except OSError as error:
            raise unreadable(path, error) from error


def _whole(path: Path) -> Iterator[bytes]:
    yield path.read_bytes()


def _json_lines(path: Path) -> Iterator[str | bytes | None]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                yield line  # is counted as no UTF-8
                continue
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f'{path}, line {number}: every line must be a JSON object with a "text" field '
                    f"({first_line(error)})"
                ) from error
            yield _field(row, f"{path}, line {number}")


def _json(path: Path) -> Iterator[str | bytes | None]:
    """A list of objects or strings, one object, or an object a line."""
    content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        if not content.lstrip().startswith(b"{"):
            raise DataError(f"{path} is no JSON: {first_line(error)}") from error
        yield from _json_lines(path)
        return
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows):
        yield row if isinstance(row, str) else _field(row, f"{path}, entry {number}")


def _field(row: Any, where: str) -> str | None:
    """The text of a row. Raises DataError when it has none."""
    if not isinstance(row, dict):
        raise DataError(f'{where} is {type(row).__name__}, not an object with a "text" field')
    if "text" not in row:
        raise DataError(
            f'{where} has the fields {", ".join(map(str, row)) or "none"}; an object with a "text" '
            "field is needed"
        )
    if not isinstance(row["text"], str | None):
        raise DataError(f'{where}: "text" is {type(row["text"]).__name__}, not a string')
    return row["text"]


def _parquet(path: Path) -> Iterator[str | bytes | None]:
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise DataError(
                    f'{path} has the columns {", ".join(columns)}; a "text" column is needed'
                )
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield text if isinstance(text, bytes) else _field({"text": text}, str(path))
    except pa.ArrowException as error:
        raise DataError(f"{path} is no parquet file: {first_line(error)}") from error


READERS: dict[str, Callable[[Path], Iterator[str | bytes | None]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}


def hub(name: str, skipped: Skipped) -> Iterator[Document]:
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
        text, reason = _text(_field(row, name))
        if text is not None:
            yield Document(f"{name}:{number}", text)
        else:
            skipped.add(reason, f"{name}:{number}")


def _text(content: str | bytes | None) -> tuple[str | None, str]:
    """(the text of a document, ""), or (None, why it is none)."""
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        if content is None or not content.strip():
            return None, "empty"
        content.encode()  # fails for half a surrogate pair, as JSON can have
    except UnicodeError:
        return None, "invalid UTF-8"
    return (None, "NUL bytes") if "\0" in content else (content, "")
