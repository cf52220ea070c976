"""The list of files, with sizes and checksums, that every folder of ours holds: by it we know our
folders again, and see what was changed in them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import xxhash

FILES = "ds_local_files.json"


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


def seal(folder: Path, kind: str, about: dict[str, Any]) -> None:
    """Write the list of a finished folder, once its files are on the disk."""
    sums = {name: checksum(folder / name, sync=True) for name in sorted(files_in(folder))}
    _write(folder / FILES, json.dumps({"kind": kind, "about": about, "files": sums}, indent=1))


def files_in(folder: Path) -> set[str]:
    """Everything below a folder but plain subfolders, by relative name."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
