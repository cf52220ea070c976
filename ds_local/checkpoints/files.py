"""Files and folders that appear whole: written under a name of one's own, then renamed.

A scratch name says whose it is, so what a killed process left can be told from what a living one
is writing, and from files of others.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ds_local.cluster.processes import Process

_count = itertools.count()
# .NAME.partial-HOST-PID-START-COUNT
_SCRATCH = re.compile(r"\..+\.partial-(?P<host>.+)-(?P<pid>\d+)-(?P<started>[\d.]+)-\d+")


def scratch_name(name: str) -> str:
    """A name that nobody else uses, for what is to be called `name`."""
    own = Process.own()
    return f".{name}.partial-{own.host}-{own.pid}-{own.started}-{next(_count)}"


def write_whole(path: Path, text: str) -> None:
    """Replace a small file so that a reader finds the old or the new one, never a part."""
    scratch = path.with_name(scratch_name(path.name))
    try:
        with scratch.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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


def remove(path: Path) -> None:
    """A file or a folder with all that is in it; it may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def leftovers(folder: Path, all_of_them: bool = False) -> Iterator[Path]:
    """Scratch files and folders whose writer has ended.

    Args:
        all_of_them: nobody else can be writing here, so those of other hosts are left over too.
    """
    own = Process.own()
    for path in folder.glob(".*.partial-*"):
        found = _SCRATCH.fullmatch(path.name)
        if found is None:
            continue
        writer = own._replace(host=found["host"], pid=int(found["pid"]), started=found["started"])
        if writer.is_gone() or (all_of_them and writer.host != own.host):
            yield path


def reason(error: OSError, folder: Path) -> str:
    """Why writing into a folder failed, in words."""
    if error.errno == errno.ENOSPC:
        found = os.statvfs(folder)
        if found.f_files and not found.f_favail:
            return f"no inode is free, all {found.f_files:,} are in use"
    return error.strerror or str(error)
