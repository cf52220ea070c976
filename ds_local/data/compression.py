"""Compressed files, read as what is inside."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from ds_local.errors import DataError, first_line

_BUFFER = 1 << 20  # bytes decompressed at once


def _zstd(file: BinaryIO) -> Any:
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), _BUFFER)


# ending -> a stream of what is inside
PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
_FAULTS = (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException)


def endings(path: Path) -> tuple[str, str]:
    """(what is inside, how it is packed) by a file's name: (".jsonl", ".gz"), (".txt", "")."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in PACKED else (last, "")


class Input:
    """A file that is read: opened as often as its form needs, and how far it has come.

    `share_read`: set by who reads it otherwise than from front to back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.share_read: float | None = None
        self._raw: BinaryIO | None = None

    @contextmanager
    def open(self) -> Iterator[Any]:
        """What is inside, as a stream of bytes.

        Raises:
            DataError: where it is damaged or cut off.
        """
        packed = endings(self.path)[1]
        with self.path.open("rb") as self._raw:
            try:
                with PACKED.get(packed, _as_it_is)(self._raw) as stream:
                    yield stream
            except _FAULTS as error:
                if not packed or _of_the_system(error):
                    raise
                raise DataError(
                    f"{self.path} is no {packed} file, damaged or cut off ({first_line(error)}); "
                    "copy it again"
                ) from error

    @property
    def bytes_read(self) -> int:
        """Of the file as it lies on the disk."""
        if self.share_read is not None:
            return int(self.share_read * self.size)
        return 0 if self._raw is None or self._raw.closed else self._raw.tell()


@contextmanager
def _as_it_is(file: BinaryIO) -> Iterator[BinaryIO]:
    yield file


def _of_the_system(error: BaseException) -> bool:
    """No fault of the content: a failing disk."""
    return isinstance(error, OSError) and error.errno is not None
