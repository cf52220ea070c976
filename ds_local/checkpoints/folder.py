"""Checkpoints that are whole or not there, and that run no code when they are read.

The files are DeepSpeed's (one per layer, one per stage, optimizer shards) and one per auxiliary
head. They are written to a folder with a name of its own; when all ranks are done, checksums are
taken, ds_local.json is added, and the folder gets its final name. The file `latest` is replaced
last. A checkpoint that a new one of the same tag replaces is moved aside first and removed last;
readers find it there. So at any moment there is a whole one.

Writing that fails on one rank (a full disk) fails on all, and leaves what was there before.
Reading checks sizes and checksums before any weight changes. No DeepSpeed here: conversion works
without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_local.checkpoints.facts import FACTS, read_facts, whose, write_facts
from ds_local.checkpoints.sums import checksums
from ds_local.errors import CheckpointError, SaveError
from ds_local.links.agreement import gather, together
from ds_local.outputs import leftovers, reason, remove, scratch_name, sync_folder
from ds_local.outputs import write_whole as _write_whole

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # a file name, with room for more


# --- finding ------------------------------------------------------------------------------------


def _is_tag(tag: str) -> bool:
    return bool(_TAG.fullmatch(tag)) and not tag.endswith(".partial")


def checked_tag(tag: str) -> str:
    """Raises CheckpointError for a tag that is no plain file name."""
    if not _is_tag(tag):
        raise CheckpointError(
            f"checkpoint tag {tag!r} must be letters, digits, dots, dashes and underscores, at "
            "most 200, and not end in .partial"
        )
    return tag


def _places(folder: Path, tag: str) -> tuple[Path, Path]:
    """Where a checkpoint may lie: under its name, or moved aside for a newer one of that name that
    has not appeared yet."""
    return folder / tag, folder / f".{tag}.old"


def locate(folder: str | Path, tag: str) -> Path:
    """The folder of the complete checkpoint `tag`.

    Raises:
        CheckpointError: when there is none; the message lists what there is.
    """
    folder = Path(folder)
    for place in _places(folder, checked_tag(tag)):
        if (place / FACTS).is_file():
            return place
    raise CheckpointError(
        whose(folder / tag)
        or f"{folder / tag} is no complete checkpoint; complete are: {_listed(folder)}"
    )


def complete_tags(folder: str | Path) -> list[str]:
    """Tags of the complete checkpoints in `folder`."""
    names = {path.parent.name for path in Path(folder).glob(f"*/{FACTS}")}
    aside = {name[1:].removesuffix(".old") for name in names if re.match(r"\..*\.old$", name)}
    return sorted(name for name in names | aside if _is_tag(name))


def _listed(folder: Path) -> str:
    return ", ".join(complete_tags(folder)) or "none"


def latest_tag(folder: str | Path) -> str:
    """The checkpoint in `folder` that the file `latest` names.

    Raises:
        CheckpointError: when there is none; the message lists what there is.
    """
    folder = Path(folder)
    try:
        tag = (folder / "latest").read_text(errors="backslashreplace").strip()
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"is unreadable: {error}"
        raise CheckpointError(
            f"nothing to resume in {folder}: the file 'latest' {why}; complete checkpoints: "
            f"{_listed(folder)}"
        ) from None
    if not _is_tag(tag):
        raise CheckpointError(
            f"{folder}/latest is damaged: it says {tag[:80]!r}, which is no checkpoint's name; "
            f"complete checkpoints: {_listed(folder)}"
        )
    if tag not in complete_tags(folder):
        raise CheckpointError(
            whose(folder / tag)
            or f"{folder}/latest names {tag!r}, which is not complete; complete are: "
            f"{_listed(folder)}"
        )
    return tag


def newest_tag(folder: str | Path) -> str | None:
    """The checkpoint to go on from: the latest, or that of the highest step where a run was killed
    before it wrote its first `latest`; None where there is none.

    Raises:
        CheckpointError: when `latest` names something else than a complete checkpoint.
    """
    if Path(folder, "latest").exists():
        return latest_tag(folder)
    steps = _steps(folder)
    return max(steps, key=steps.__getitem__, default=None)


def _steps(folder: str | Path) -> dict[str, int]:
    return {tag: read_facts(locate(folder, tag))["step"] for tag in complete_tags(folder)}


def agreed_tag(folder: str | Path, find: Callable[[str | Path], str | None]) -> str | None:
    """What `find` gives. Hosts without a common folder may have been killed between their renames:
    then the newest checkpoint that all have. A collective call."""
    tags = gather(together(lambda: find(folder)))
    if len(set(tags)) == 1:
        return tags[0]
    steps = gather(together(lambda: _steps(folder)))
    common = set.intersection(*map(set, steps))
    if not common:
        raise CheckpointError(
            f"hosts have different checkpoints in {folder} ({', '.join(map(str, tags))}) and none "
            "in common; copy one folder to all hosts"
        )
    return max(common, key=steps[0].__getitem__)


# --- writing ------------------------------------------------------------------------------------


class Writing:
    """One attempt at a checkpoint: write into `target`, then `commit` or `abandon`. Making one and
    committing are collective calls.

    Raises:
        SaveError: on every rank, when the disk does not take it.
        CheckpointError: when something else than a checkpoint has its name.
    """

    def __init__(self, folder: str | Path, tag: str) -> None:
        self.folder, self.tag = Path(folder), checked_tag(tag)
        self.partial = gather(scratch_name(tag))[0]
        self.target = self.folder / self.partial
        self._leads = leads(self.folder)
        together(self._begin)

    def _begin(self) -> None:
        if not self._leads:
            return
        final = self.folder / self.tag
        if final.exists() and not (final / FACTS).is_file():
            raise CheckpointError(
                f"{final} exists and is no checkpoint, so it is left alone; choose another tag"
            )
        for path in leftovers(self.folder):
            remove(path)

    def commit(
        self,
        facts: Mapping[str, Any],
        save_latest: bool,
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        """Seal what all ranks have written and give it its name.

        Args:
            expected: sums that the files have, where they are known; CheckpointError is raised for
                a file that has others.
        """
        try:
            sums = checksums(self.target)
        except CheckpointError as error:
            raise SaveError(str(error)) from error
        for name, known in (expected or {}).items():
            if list(sums.get(name, ())) != list(known):
                raise CheckpointError(
                    f"{name} of {self.tag} is damaged: it changed since it was written; use "
                    "another checkpoint"
                )
        together(lambda: self._commit({**facts, "files": sums}, save_latest))

    def _commit(self, facts: Mapping[str, Any], save_latest: bool) -> None:
        if not self._leads:
            return
        final, old = _places(self.folder, self.tag)
        try:
            _write_whole(self.target / FACTS, write_facts(facts))
            if final.exists():
                remove(old)
                final.rename(old)
            self.target.rename(final)
            sync_folder(self.folder)
            if save_latest:
                _write_whole(self.folder / "latest", self.tag)
        except OSError as error:
            raise SaveError(
                f"cannot save {final}: {reason(error, self.folder, room=False)}"
            ) from error
        remove(old)

    def abandon(self) -> None:
        """Remove what has been written. No collective call."""
        if self._leads:
            remove(self.target)


def clean(folder: str | Path) -> None:
    """Remove what killed runs left half-written. To be called when nobody else writes here. A
    collective call."""
    if leads(Path(folder)):
        for path in leftovers(Path(folder), all_of_them=True):
            remove(path)


def leads(folder: Path) -> bool:
    """Is this the lowest rank that sees this folder, which hosts may share or have one each? It
    does the renaming. A collective call."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    marks = [folder / name for name in gather(scratch_name(f"rank-{rank}"))]

    def mark() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            marks[rank].touch()
        except OSError as error:
            raise SaveError(
                f"cannot write to {folder}: {reason(error, folder, room=False)}"
            ) from error

    try:
        together(mark)
        lowest = next(number for number, path in enumerate(marks) if path.exists())
        gather(None)  # everybody has looked
    finally:
        with suppress(OSError):  # it may not be there, nor its folder
            marks[rank].unlink()
    return rank == lowest
