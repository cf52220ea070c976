"""Checkpoints that are whole or not there, and that run no code when they are read.

The files are DeepSpeed's (one per layer, one per stage, optimizer shards) and one per auxiliary
head. They are written under a temporary name; when all ranks are done, checksums are taken,
ds_local.json is added, and the folder gets its final name. The file `latest` is replaced last. So a
run killed at any moment leaves complete checkpoints only.

Reading checks sizes and checksums before any weight changes. No DeepSpeed here: conversion works
without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_local.errors import CheckpointError

FACTS = "ds_local.json"
FORMAT = 1
HEAD_FILE = "head_{:02d}-model_states.pt"  # of a segment's auxiliary head
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def checked_tag(tag: str) -> str:
    """Raises CheckpointError for a tag that is no plain file name."""
    if not _TAG.fullmatch(tag) or tag.endswith(".partial"):
        raise CheckpointError(
            f"checkpoint tag {tag!r} must be letters, digits, dots, dashes and underscores, not end in .partial"
        )
    return tag


def latest_tag(folder: str | Path) -> str:
    """The newest complete checkpoint in `folder`.

    Raises:
        CheckpointError: when there is none; the message lists what there is.
    """
    folder = Path(folder)
    complete = sorted(
        p.parent.name for p in folder.glob(f"*/{FACTS}") if not p.parent.name.endswith(".partial")
    )
    try:
        tag = checked_tag((folder / "latest").read_text().strip())
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(
            f"nothing to resume in {folder}: the file 'latest' is missing; complete checkpoints: {', '.join(complete) or 'none'}"
        ) from None
    if tag not in complete:
        raise CheckpointError(
            f"{folder}/latest names {tag!r}, which is not complete; complete are: {', '.join(complete) or 'none'}"
        )
    return tag


def read_facts(checkpoint: str | Path) -> dict[str, Any]:
    """What ds_local.json says about a checkpoint folder.

    Raises:
        CheckpointError: when it is missing or of another format.
    """
    path = Path(checkpoint, FACTS)
    try:
        facts = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a complete ds_local checkpoint: {path.name}: {error}"
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has another format than {FORMAT}; use the version that wrote it"
        )
    return facts


def layout(facts: Mapping[str, Any]) -> str:
    """What an optimizer's state depends on."""
    section = facts["local_parallel"]
    head = {
        key: section["head"][key]
        for key in ("blocks", "blocks_from", "readout", "rank", "temperature")
    }
    return (
        f"segment parts {facts['segment_parts']} on {facts['num_stages']} stages x {facts['num_replicas']} replicas, "
        f"heads at {facts.get('head_segments')} with {head}"
        + (
            ", learning rates by segment"
            if section.get("lr_multipliers") or section.get("warmup_stagger")
            else ""
        )
    )


def begin(folder: str | Path, tag: str) -> str:
    """The temporary tag to write under; leftovers of an earlier attempt are removed. A collective
    call."""
    partial = f"{tag}.partial"
    if dist.get_rank() == _leader(Path(folder)):
        shutil.rmtree(Path(folder, partial), ignore_errors=True)
    dist.barrier()
    return partial


def commit(
    folder: str | Path, partial: str, tag: str, facts: dict[str, Any], save_latest: bool
) -> None:
    """Seal what all ranks have written under `partial` and give it its name. A collective call."""
    written, final = Path(folder, partial), Path(folder, tag)
    sums = _checksums(written)
    if dist.get_rank() == _leader(Path(folder)):
        _write_whole(
            written / FACTS, json.dumps({"format": FORMAT, **facts, "files": sums}, indent=1) + "\n"
        )
        old = final.with_name(f"{tag}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        written.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        if save_latest:
            _write_whole(Path(folder, "latest"), tag)
    dist.barrier()


def verify(checkpoint: str | Path) -> dict[str, Any]:
    """Check sizes and checksums of all files, shared among the ranks. A collective call where ranks
    have met.

    Returns:
        The facts of the checkpoint.

    Raises:
        CheckpointError: on every rank, naming the files that are damaged.
    """
    facts = read_facts(checkpoint)
    expected = facts["files"]
    # hosts without a common folder have a part of the files each
    found = _checksums(
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
            f"{checkpoint} is damaged: {', '.join(damaged)} changed since it was written; use another checkpoint"
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


def _checksums(folder: Path, names: list[str] | None = None) -> dict[str, tuple[int, str]]:
    """name -> (bytes, SHA-256) of the files in a folder, each taken by one of the ranks that see
    it."""
    listing = (
        names if names is not None else sorted(p.name for p in folder.iterdir() if p.is_file())
    )
    rank, seen = 0, [listing]
    if dist.is_initialized():
        rank, seen = dist.get_rank(), [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(seen, listing)
    everything = sorted({name for part in seen for name in part})
    owners = {name: [r for r, part in enumerate(seen) if name in part] for name in everything}
    mine = [
        name
        for number, name in enumerate(everything)
        if owners[name][number % len(owners[name])] == rank
    ]
    sums = {name: _checksum(folder / name) for name in mine}
    if not dist.is_initialized():
        return sums
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, sums)
    return {name: value for part in parts for name, value in part.items()}


def _checksum(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        os.fsync(file.fileno())  # what is checked is what is on the disk
    return path.stat().st_size, digest.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    """Replace a small file so that a reader finds the old or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _leader(folder: Path) -> int:
    """The lowest rank that sees this folder, which hosts may share or have one each: it does the
    renaming. A collective call."""
    token = [f"{os.getpid()}-{time.time_ns()}"]
    dist.broadcast_object_list(token, src=0)
    folder.mkdir(parents=True, exist_ok=True)
    marks = [folder / f".rank-{rank}-{token[0]}" for rank in range(dist.get_world_size())]
    marks[dist.get_rank()].touch()
    dist.barrier()
    lowest = next(rank for rank, mark in enumerate(marks) if mark.exists())
    dist.barrier()
    marks[dist.get_rank()].unlink()
    return lowest
