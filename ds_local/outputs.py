"""What we write: whole or not at all, and only over what we made.

A folder is written beside its place, under a name of its own, and takes its place in one step; so
does a file. Every folder so made lists its files, with sizes and checksums, in
`ds_local_files.json`. By that list we know our folders again, and see what was changed in them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import xxhash

from ds_local.errors import DsLocalError, OutputError

FILES = "ds_local_files.json"
_MARK = "ds_local"  # how the lock of a scratch folder of ours begins
_HEAD = 64 << 10  # bytes of a file in which its mark must be
# what storage refuses, whoever says so
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


# --- folders


@contextmanager
def new_folder(
    output: str | Path,
    kind: str,
    error: type[DsLocalError] = OutputError,
    exact: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """A folder to write into. It takes the place of `output` when the block ends well, and is
    removed when not; what was there is whole until then. Leftovers of killed attempts are removed.

    Args:
        output: free, an empty folder, or a folder of this kind that we made.
        kind: what it will hold, in words.
        error: raised for what goes wrong.
        exact: an earlier folder in which a file was changed is not replaced.
        about: plain facts for the list of files.

    Raises:
        error: when `output` is not ours to replace, or cannot be written: disk full, read-only, ...
    """
    place = Path(os.path.abspath(output))  # a link is not followed, but refused
    with ExitStack() as stack:
        stack.enter_context(_storage_named(place, error))
        check_folder(place, kind, error, exact)
        scratch = stack.enter_context(_scratch(place))
        new = scratch / "new"
        with _storage_named(place, error, scratch):
            new.mkdir()
            yield new
            _seal(new, kind, dict(about or {}))
            check_folder(place, kind, error, exact)  # others may have put something there meanwhile
            _swap(new, place)


def check_folder(
    place: str | Path, kind: str, error: type[DsLocalError] = OutputError, exact: bool = False
) -> None:
    """Raises `error` when a folder may not be written at `place`; see `new_folder`."""
    if why := _foreign(Path(place), kind, exact):
        raise error(f"{place} {why}, so it is left alone; choose another --output")


def _foreign(place: Path, kind: str, exact: bool) -> str:
    """Why a place is not ours to replace, "" when it is free or ours."""
    if place.is_symlink():
        return "is a symbolic link"
    if not place.exists():
        return ""
    if not place.is_dir():
        return "exists and is not a folder"
    found = _files_in(place)
    listed = read_list(place)
    if listed is None:
        return f"exists and is no {kind} that we wrote" if any(place.iterdir()) else ""
    if listed["kind"] != kind:
        return f"is no {kind}, but the {listed['kind']} of an earlier command"
    strange = sorted(found - listed["files"].keys() - {FILES})
    if strange:
        return f"holds {_some(strange)}, which we did not write"
    changed = damage(place) if exact else ""
    return f"was changed since we wrote it ({changed})" if changed else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files_in(folder: Path) -> set[str]:
    """Everything below a folder but plain subfolders, by relative name."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def read_list(folder: str | Path) -> dict[str, Any] | None:
    """The list of files of a folder that we wrote: {"kind", "about", "files": name -> [bytes,
    checksum]}; None where there is none, or no list of ours."""
    try:
        listed = json.loads(Path(folder, FILES).read_text())
        files = listed["files"]
        well_formed = isinstance(listed["kind"], str) and isinstance(listed["about"], dict)
        sums = [(int(size), str(digest)) for size, digest in files.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return listed if well_formed and sums else None


def damage(folder: str | Path, limit: int | None = None, sample: int = 0) -> str:
    """What is not as it was written in a folder that has a list of files, "" when all is well.

    Args:
        limit: bytes to read at most; default all. Sizes of all files are compared in any case.
        sample: seed of the choice of files, where they hold more than `limit`; small ones, up to
            a hundredth of it, always belong to it.
    """
    folder = Path(folder)
    listed = read_list(folder)
    if listed is None:
        return f"{FILES} is missing or damaged"
    files: dict[str, list[Any]] = listed["files"]
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    names = random.Random(sample).sample(sorted(files), len(files))
    left = sum(size for size, _ in files.values()) if limit is None else limit
    names.sort(key=lambda name: files[name][0] * 100 > left)  # small ones first
    for name in names:
        if left <= 0:
            break
        left -= files[name][0]
        if checksum(folder / name) != list(files[name]):
            return f"{name} changed since it was written"
    return ""


def checksum(path: Path, sync: bool = False) -> list[Any]:
    """[bytes, XXH3 digest] of a file; with `sync` once it is on the disk."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
        size = file.tell()
    return [size, digest.hexdigest()]


def _seal(folder: Path, kind: str, about: dict[str, Any]) -> None:
    sums = {name: checksum(folder / name, sync=True) for name in sorted(_files_in(folder))}
    _write(folder / FILES, json.dumps({"kind": kind, "about": about, "files": sums}, indent=1))


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A folder beside `place` that is removed in the end; locked, so that others see whether its
    owner lives."""
    place.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(place)
    scratch = Path(tempfile.mkdtemp(".partial", f".{place.name}.", place.parent))
    try:
        with (scratch / "lock").open("w") as lock:
            lock.write(f"{_MARK}: process {os.getpid()} on {socket.gethostname()} works here\n")
            lock.flush()
            _try_lock(lock.fileno())
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _clear_leftovers(place: Path) -> None:
    """Remove scratch folders of attempts that were killed, and finish what they had begun."""
    start, end = f".{place.name}.", ".partial"
    for path in place.parent.iterdir():
        if path.name.startswith(start) and path.name.endswith(end) and _is_abandoned(path):
            if (path / "old").is_dir() and not place.exists():
                (path / "old").rename(place)  # killed between the two steps of `_swap`
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(scratch: Path) -> bool:
    """Is it a scratch folder of ours whose owner is gone?"""
    try:
        if not any(scratch.iterdir()):  # killed, or just begun
            return time.time() - scratch.stat().st_mtime > 60
        with (scratch / "lock").open("r+") as lock:
            text = lock.read(len(_MARK))
            return text in ("", _MARK) and _try_lock(lock.fileno())
    except OSError:
        return False


def _try_lock(file: int) -> bool:
    """The lock ends with the process, however that ends. False when another has it, and on file
    systems without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _swap(new: Path, place: Path) -> None:
    """Give `new` its place. What was there goes to the scratch folder, in the same step where the
    file system can exchange names."""
    if not place.exists():
        new.rename(place)
    elif not exchange(new, place):
        place.rename(new.with_name("old"))
        new.rename(place)
    _sync_folder(place.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where that is not to be had
    (Linux has it, on most local file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchanged = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(here, names[0], here, names[1], exchanged) == 0


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- files


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
        above = _existing(path.parent)
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
    with _storage_named(path, OutputError):
        if path.exists() and not path.is_file():  # a device or a pipe: nothing to replace
            yield path
            return
        place = path.resolve()  # a link stays, and what it names is replaced
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_name(f".{place.stem}.partial{place.suffix}")
        try:
            with _storage_named(path, OutputError, scratch):
                yield scratch
                with scratch.open("rb") as file:
                    os.fsync(file.fileno())
                scratch.replace(place)
        finally:
            scratch.unlink(missing_ok=True)


def write_file(path: str | Path, text: str) -> None:
    """Write or replace a text file, whole or not at all. Raises OutputError."""
    with new_file(path) as scratch:
        scratch.write_text(text)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


# --- what storage refuses


@contextmanager
def _storage_named(
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
        written = "" if scratch is None else f" after {_size(scratch):,} bytes"
        raise error(f"cannot write {place}{written}: {trouble}") from found


def storage_trouble(found: BaseException, place: str | Path) -> str | None:
    """What the storage under `place` refused, with the space it has left; None when an error is
    about something else. Libraries wrap such errors, and some do not say what it was."""
    place = Path(place)
    number = _refusal(found, place)
    above = _existing(place)
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


def _existing(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    place = Path(os.path.abspath(path))
    return next(one for one in (place, *place.parents) if os.path.exists(one))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files if one.is_file())
