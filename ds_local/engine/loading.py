"""Loading: everything is compared with this run first, on all ranks, before a weight changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from deepspeed.utils import logger

from ds_local.checkpoints.facts import changes_in_words, layout_changes, read_facts
from ds_local.checkpoints.folder import agreed_tag, latest_tag, locate
from ds_local.checkpoints.sums import verify
from ds_local.engine.finite_weights import check_weights_finite
from ds_local.engine.loading_checks import Checks, same_scheduler
from ds_local.engine.moving import trained_names
from ds_local.engine.safe_files import RESERVED
from ds_local.engine.saving import facts_of
from ds_local.engine.updates import StageUpdates
from ds_local.errors import MoveError
from ds_local.links.agreement import gather, together

Read = Callable[[str, bool], tuple[str | None, dict[str, Any]]]


def load(
    engine: StageUpdates,
    read: Read,
    load_dir: str,
    tag: str | None,
    strict: bool,
    load_optimizer_states: bool,
    load_scheduler: bool,
    load_module_only: bool,
) -> tuple[str | None, dict[str, Any]]:
    """Load a checkpoint, by default the latest.

    Args:
        read: DeepSpeed's own loading, given the folder's name and whether to load optimizer states.

    Raises:
        CheckpointError: when there is none, it is damaged, of another program or model, or the
            layout differs. Nothing has been changed by then.
    """
    found = agreed_tag(load_dir, latest_tag if tag is None else lambda _: tag)
    place = together(lambda: locate(load_dir, str(found)))
    facts = verify(place)
    with_optimizer = load_optimizer_states and not load_module_only
    changes = layout_changes(facts, facts_of(engine))
    trained = trained_names(engine) if with_optimizer and changes else {}
    checks = Checks(engine, place, facts, changes, trained, strict, with_optimizer)
    notes = gather(together(lambda: checks.run(load_scheduler and not load_module_only)))
    for note in dict.fromkeys(note for own in notes for note in own):
        if engine.global_rank == 0:
            logger.warning(note)
    engine.copies.collect(engine.global_steps)
    engine.executor.abandon()
    engine.replicas.before_load()
    path, client_state = _read(engine, read, checks, load_dir, load_optimizer_states)
    if with_optimizer:
        engine.replicas.load(checks.look, facts)
        engine.copies.load(checks.look, checks.copies_file, engine.global_steps)
        schedule = engine.plan.schedule_at(engine.global_steps)
        engine.executor.stash.load(checks.look, checks.files_ahead, schedule)
    else:
        engine.replicas.load(None, facts)
        engine.copies.load(checks.look, lambda _: None, engine.global_steps)
        engine.executor.stash.end()
    if engine.average.load(checks.look, facts["files"]) and engine.global_rank == 0:
        logger.warning(
            f"{place} has not all averages of weights (ema): these begin with the weights"
        )
    check_weights_finite(engine, f"with {place}", "use another checkpoint")
    # DeepSpeed gives whatever it did not use, its own notes among it
    return path, {key: value for key, value in client_state.items() if key not in RESERVED}


def _read(
    engine: StageUpdates, read: Read, checks: Checks, load_dir: str, load_optimizer_states: bool
) -> tuple[str | None, dict[str, Any]]:
    """What DeepSpeed loads, and the optimizer's state. A collective call."""
    place, move = checks.place, checks.move
    # DeepSpeed 0.19 writes the bf16 optimizer's shards to ZeRO files even without ZeRO, but does
    # not look for them there
    bf16_alone = engine.using_bf16_optimizer and not engine.zero_optimization()
    unlooked_for = checks.with_optimizer and bf16_alone
    if move is None:
        path, client_state = read(place.name, load_optimizer_states and not unlooked_for)
        if unlooked_for:
            engine.load_zero_checkpoint(load_dir, place.name)
        engine.moved = checks.heads_in_words()
        return path, client_state
    files = engine.checkpoint_engine
    files.maps = True  # the state of a whole stage of the checkpoint is more than this one's share
    try:
        path, client_state = read(place.name, False)
        move.load()
    finally:
        files.maps = False
    engine.skipped_steps = checks.skipped_steps
    compared = move.compare()
    said = [
        f"another layout: {changes_in_words(checks.changes)}",
        f"{compared} tensors moved by name, each compared with the checkpoint",
        checks.heads_in_words(),
    ]
    engine.moved = "; ".join(filter(None, said))
    kept = {key: value for key, value in client_state.items() if key not in RESERVED}
    return path, copy.deepcopy(kept)  # not on the disk


def load_what_fits(
    engine: StageUpdates, load_dir: str, tag: str | None, allowed: Collection[str]
) -> str:
    """Load a checkpoint as `load_checkpoint` does, without the optimizer's state or the scheduler's
    where that cannot go on and may start afresh: with "optimizer" or "scheduler" among what is
    allowed.

    Returns:
        What moved, and what starts afresh, in a sentence; "" when nothing does.
    """
    found = agreed_tag(load_dir, latest_tag if tag is None else lambda _: tag)
    facts = together(lambda: read_facts(locate(load_dir, str(found))))
    scheduler = "scheduler" not in allowed or same_scheduler(facts, engine)
    said = [] if scheduler else ["the scheduler starts afresh"]
    how = {"load_lr_scheduler_states": scheduler}
    try:
        engine.load_checkpoint(load_dir, found, **how)
    except MoveError as error:
        if "optimizer" not in allowed:
            raise
        engine.load_checkpoint(load_dir, found, load_optimizer_states=False, **how)
        said.append(f"the optimizer starts afresh ({str(error).partition(';')[0]})")
    return "; ".join([engine.moved, *said] if engine.moved else said)
