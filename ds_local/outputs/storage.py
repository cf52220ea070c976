"""What the storage under a path refuses, in words: full, read-only, broken."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_local.errors import DsLocalError

# what storage refuses, whoever says so
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@contextmanager
def storage_named(
    place: Path, error: type[DsLocalError], scratch: Path | None = None
) -> Iterator[None]:
    """Errors of storage become `error`, with path and bytes; all others pass."""
    try:
        yield
    except DsLocalError:
        raise
    except Exception as found:
        trouble = storage_trouble(found, place)
        if trouble is None:
            raise
        written = "" if scratch is None else f" after {size_of(scratch):,} bytes"
        raise error(f"cannot write {place}{written}: {trouble}") from found


def storage_trouble(found: BaseException, place: str | Path) -> str | None:
    """What the storage under `place` refused, with the space it has left; None when an error is
    about something else. Libraries wrap such errors, and some do not say what it was."""
    place = Path(place)
    number = _refusal(found, place)
    above = existing(place)
    space = os.statvfs(above)
    full = space.f_bavail * space.f_frsize < 1 << 20 or (space.f_files > 0 and not space.f_favail)
    if number is None and full and isinstance(found, OSError | RuntimeError):
        number = errno.ENOSPC
    if number is None:
        return None
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return os.strerror(number).lower()
    inodes = ", no inodes" if space.f_files > 0 and not space.f_favail else ""
    free = space.f_bavail * space.f_frsize
    return (
        f"{os.strerror(number).lower()} ({free:,} bytes{inodes} free in {above}); make room and "
        "run it again"
    )


def _refusal(found: BaseException, place: Path) -> int | None:
    """The number of the system's error behind an error, None when there is none about `place`."""
    below = str(Path(os.path.abspath(place)).parent)
    seen: BaseException | None = found
    while seen is not None:
        for number in _STORAGE:
            if getattr(seen, "errno", None) == number or os.strerror(number) in str(seen):
                return number
        if isinstance(seen, OSError) and str(seen.filename or "").startswith(below):
            return seen.errno
        seen = seen.__cause__ or seen.__context__
    return None


def existing(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    place = Path(os.path.abspath(path))
    return next(one for one in (place, *place.parents) if os.path.exists(one))


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files if one.is_file())


def reason(error: OSError, folder: Path, room: bool = True) -> str:
    """Why writing into a folder failed, in a few words.

    Args:
        room: also say what is free, where there is too little.
    """
    words = error.strerror or str(error)
    if error.errno != errno.ENOSPC:
        return words
    found = os.statvfs(folder)
    if found.f_files and not found.f_favail:
        return f"no inode is free, all {found.f_files:,} are in use"
    return f"{words} ({found.f_bavail * found.f_frsize:,} bytes are free)" if room else words


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)
