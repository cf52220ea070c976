"""Sizes and checksums of a checkpoint's files, taken and checked by all ranks together."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_local.checkpoints.facts import read_facts
from ds_local.errors import CheckpointError
from ds_local.links.agreement import gather, together


def verify(checkpoint: str | Path) -> dict[str, Any]:
    """Check sizes and checksums of all files, shared among the ranks. A collective call where ranks
    have met.

    Returns:
        The facts of the checkpoint.

    Raises:
        CheckpointError: on every rank, naming the files that are damaged.
    """
    facts = together(lambda: read_facts(checkpoint))
    expected = facts["files"]
    # hosts without a common folder have a part of the files each
    found = checksums(
        Path(checkpoint), sorted(name for name in expected if Path(checkpoint, name).is_file())
    )
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"{checkpoint} is missing {', '.join(missing)}; use another checkpoint"
        )
    damaged = [name for name in expected if list(found[name]) != list(expected[name])]
    if damaged:
        raise CheckpointError(
            f"{checkpoint} is damaged: {', '.join(damaged)} changed since it was written; use "
            "another checkpoint"
        )
    return facts


def check_file(checkpoint: str | Path, facts: dict[str, Any], name: str) -> None:
    """Check one file of a checkpoint against its facts.

    Raises:
        CheckpointError: when the file is missing, or not what was written.
    """
    path = Path(checkpoint, name)
    if name not in facts["files"] or not path.is_file():
        raise CheckpointError(f"{path} is missing; use another checkpoint")
    if list(_checksum(path)) != list(facts["files"][name]):
        raise CheckpointError(
            f"{path} is damaged: it changed since it was written; use another checkpoint"
        )


def checksums(folder: Path, names: list[str] | None = None) -> dict[str, tuple[int, str]]:
    """name -> (bytes, SHA-256) of the files in a folder, each taken by one of the ranks that see
    it."""

    def listing() -> list[str]:
        return sorted(p.name for p in folder.iterdir() if p.is_file()) if names is None else names

    rank = dist.get_rank() if dist.is_initialized() else 0
    seen = gather(together(listing))
    everything = sorted({name for part in seen for name in part})
    owners = {name: [r for r, part in enumerate(seen) if name in part] for name in everything}
    mine = [
        name
        for number, name in enumerate(everything)
        if owners[name][number % len(owners[name])] == rank
    ]
    sums = together(lambda: {name: _checksum(folder / name) for name in mine})
    return {name: value for part in gather(sums) for name, value in part.items()}


def _checksum(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            os.fsync(file.fileno())  # what is checked is what is on the disk
        return path.stat().st_size, digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
