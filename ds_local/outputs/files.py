"""Files that appear whole: written under a scratch name beside their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_local.errors import OutputError
from ds_local.outputs.scratch import leftovers, remove, scratch_name
from ds_local.outputs.storage import existing, storage_named, sync_folder

_HEAD = 64 << 10  # bytes of a file in which its mark must be


def check_file(path: str | Path, mark: str) -> Path:
    """A file that a command is asked to write: free, empty, or an earlier one of the same command.

    Args:
        mark: what all files of this command have in their first 64 KiB.

    Raises:
        OutputError: when it is something else, or cannot be written.
    """
    path = Path(path)
    try:
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(_HEAD)
            if head.strip() not in (b"", b"[]") and mark.encode() not in head:
                raise OutputError(
                    f"{path} exists and was not written by this command, so it is left alone; "
                    "choose another name"
                )
        elif path.is_dir():
            raise OutputError(f"{path} is a folder; give the name of a file")
        above = existing(path.parent)
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise OutputError(f"cannot write {path}: {above} is no folder that can be written to")
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends well.

    Raises:
        OutputError: when it cannot be written: disk full, read-only, ...
    """
    path = Path(path)
    with storage_named(path, OutputError):
        if path.exists() and not path.is_file():  # a device or a pipe: nothing to replace
            yield path
            return
        place = path.resolve()  # a link stays, and what it names is replaced
        place.parent.mkdir(parents=True, exist_ok=True)
        for killed in leftovers(place.parent, name=place.name):
            remove(killed)
        scratch = place.with_name(scratch_name(place.name, place.suffix))
        try:
            with storage_named(path, OutputError, scratch):
                yield scratch
                _put(scratch, place)
        finally:
            scratch.unlink(missing_ok=True)


def write_file(path: str | Path, text: str) -> None:
    """Write or replace a text file, whole or not at all. Raises OutputError."""
    with new_file(path) as scratch:
        scratch.write_text(text)


def write_whole(path: Path, text: str, secret: bool = False) -> None:
    """As `write_file`, in a folder that is there; raises OSError as it comes. A secret is at no
    time for others to read."""
    scratch = path.with_name(scratch_name(path.name))
    try:
        with open(scratch, "w", opener=_for_the_owner if secret else None) as file:
            file.write(text)
        _put(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _put(scratch: Path, place: Path) -> None:
    """Give a finished file its place: a reader finds the old or the new one, never a part."""
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(place)
    sync_folder(place.parent)
