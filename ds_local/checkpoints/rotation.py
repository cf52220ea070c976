"""Removing older checkpoints of a run, and nothing else."""

from __future__ import annotations

from pathlib import Path

from ds_local.checkpoints.facts import FACTS, read_facts
from ds_local.checkpoints.folder import checked_tag, complete_tags, latest_tag, leads
from ds_local.errors import CheckpointError
from ds_local.outputs import remove, scratch_name
from ds_local.outputs.checkpoint_names import step_of


def remove_older(folder: str | Path, keep: int) -> list[str]:
    """Remove checkpoints of the loop, all but the newest `keep`.

    The one that `latest` names stays, so do those with tags of their own, and any with a file in it
    that was not saved with it. A removal that is killed leaves a folder with a scratch name, which
    the next start clears away. A collective call.

    Returns:
        Their tags, on the rank that removed them.
    """
    folder = Path(folder)
    if not leads(folder):
        return []
    steps = {
        tag: step
        for tag in complete_tags(folder)
        if (step := step_of(tag)) is not None  # those with tags that nobody has chosen
    }
    kept = set(sorted(steps, key=steps.__getitem__)[-keep:])
    if (folder / "latest").exists():  # not yet where only tags of somebody's own are saved
        kept.add(latest_tag(folder))
    return [tag for tag in sorted(steps.keys() - kept) if _removed(folder, tag)]


def _removed(folder: Path, tag: str) -> bool:
    """Remove it, unless there is something of the user's in it."""
    place = folder / checked_tag(tag)
    try:
        files = {FACTS, *read_facts(place)["files"]}
    except CheckpointError:  # no longer what was written
        return False
    if not {path.name for path in place.iterdir()} <= files:
        return False
    scratch = folder / scratch_name(tag)
    place.rename(scratch)
    remove(scratch)
    return True
