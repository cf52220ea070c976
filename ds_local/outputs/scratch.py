"""Names for what is half-written.

A scratch name says whose it is, so what a killed process left can be told from what a living one
is writing, and from files of others.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ds_local.outputs.processes import Process

_count = itertools.count()
# .NAME.partial-HOST-PID-START-COUNT, and the suffix by which libraries choose a format
_SCRATCH = re.compile(
    r"\.(?P<name>.+)\.partial-(?P<host>.+)-(?P<pid>\d+)-(?P<started>[\d.]+)-\d+(\.\w+)?"
)


def scratch_name(name: str, suffix: str = "") -> str:
    """A name that nobody else uses, for what is to be called `name`."""
    own = Process.own()
    return f".{name}.partial-{own.host}-{own.pid}-{own.started}-{next(_count)}{suffix}"


def leftovers(folder: Path, all_of_them: bool = False, name: str | None = None) -> Iterator[Path]:
    """Scratch files and folders whose writer has ended.

    Args:
        all_of_them: nobody else can be writing here, so those of other hosts are left over too.
        name: only those for what is to be called so.
    """
    own = Process.own()
    for path in folder.glob(".*.partial-*"):
        found = _SCRATCH.fullmatch(path.name)
        if found is None or name not in (None, found["name"]):
            continue
        writer = own._replace(host=found["host"], pid=int(found["pid"]), started=found["started"])
        if writer.is_gone() or (all_of_them and writer.host != own.host):
            yield path


def remove(path: Path) -> None:
    """A file or a folder with all that is in it; it may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
