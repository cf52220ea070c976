"""Folders that appear whole, and only over what we made.

A folder is written beside its place, under a name of its own, and takes its place in one step.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ds_local.errors import DsLocalError, OutputError
from ds_local.outputs.lists import FILES, damage, files_in, read_list, seal
from ds_local.outputs.storage import storage_named, sync_folder

_MARK = "ds_local"  # how the lock of a scratch folder of ours begins


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
        stack.enter_context(storage_named(place, error))
        check_folder(place, kind, error, exact)
        scratch = stack.enter_context(_scratch(place))
        new = scratch / "new"
        with storage_named(place, error, scratch):
            new.mkdir()
            yield new
            seal(new, kind, dict(about or {}))
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
    found = files_in(place)
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
    ours = re.compile(re.escape(f".{place.name}.") + r"[^.]+\.partial")  # no dot: of this alone
    for path in place.parent.iterdir():
        if ours.fullmatch(path.name) and _is_abandoned(path):
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
    sync_folder(place.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where that is not to be had
    (Linux has it, on most local file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchanged = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(here, names[0], here, names[1], exchanged) == 0
