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


class _Streams(io.RawIOBase):
    """Compressed streams, one behind the other. Python's own readers take a second one that is
    damaged for something else, and leave out the rest of the file.

    Args:
        begin: makes what decompresses one stream.
    """

    def __init__(self, file: BinaryIO, begin: Callable[[], Any]) -> None:
        self._file, self._begin = file, begin
        self._stream, self._following = begin(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = b""
        while not found:
            if self._stream.eof and not self._next():
                return 0
            taken, self._following = self._following, b""
            if self._stream.needs_input and not taken:
                taken = self._file.read(_BUFFER)
                if not taken:
                    raise EOFError("it ends in the middle of a stream")
            found = self._stream.decompress(taken, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _next(self) -> bool:
        """Go on with the next stream, behind zeros if there are some. False at the end."""
        following = self._stream.unused_data.lstrip(b"\0")
        while not following:
            more = self._file.read(_BUFFER)
            if not more:
                return False
            following = more.lstrip(b"\0")
        self._stream, self._following = self._begin(), following
        return True


# ending -> a stream of what is inside
PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER),
    ".bz2": lambda file: io.BufferedReader(_Streams(file, bz2.BZ2Decompressor), _BUFFER),
    ".xz": lambda file: io.BufferedReader(_Streams(file, lzma.LZMADecompressor), _BUFFER),
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
