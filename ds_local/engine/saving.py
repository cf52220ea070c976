"""Saving and loading: DeepSpeed's files, whole or not there, and what is ours beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ds_local.checkpoints import folder as checkpoint
from ds_local.errors import CheckpointError
from ds_local.model.blocks import config_dict
from ds_local.replicas.subnets import saved_scaling
from ds_local.schedules.run_plan import head_segments


def save(
    engine: Any, write: Callable[[str], Any], save_dir: str, tag: str | None, save_latest: bool
) -> None:
    """Save a checkpoint; the folder `save_dir/tag` appears complete or not at all.

    Args:
        write: DeepSpeed's own saving, given the temporary tag.
    """
    tag = checkpoint.checked_tag(str(tag or f"global_step{engine.global_steps}"))
    partial = checkpoint.begin(save_dir, tag)
    target = os.path.join(save_dir, partial)
    engine.copies.save(target, engine.global_steps, engine.replica_id)
    engine.replicas.save(target)
    with engine.replicas.whole(moments=True):
        write(partial)
    checkpoint.commit(save_dir, partial, tag, facts_of(engine), save_latest)
    engine.reports.flush()


def load(
    engine: Any,
    read: Callable[[str, bool], tuple[str | None, dict[str, Any]]],
    load_dir: str,
    tag: str | None,
    load_optimizer_states: bool,
    load_module_only: bool,
) -> tuple[str | None, dict[str, Any]]:
    """Load a checkpoint, by default the latest.

    Args:
        read: DeepSpeed's own loading, given the tag and whether to load optimizer states.

    Raises:
        CheckpointError: when there is none, it is damaged, or the layout differs. Nothing has been
            changed by then.
    """
    tag = checkpoint.checked_tag(tag) if tag else checkpoint.latest_tag(load_dir)
    facts = checkpoint.verify(os.path.join(load_dir, tag))
    with_optimizer = load_optimizer_states and not load_module_only
    own_facts = facts_of(engine)
    saved, own = checkpoint.layout(facts), checkpoint.layout(own_facts)
    if with_optimizer and saved != own:
        raise CheckpointError(
            f"{load_dir}/{tag} has {saved}, this run has {own}; keep the layout, or load weights "
            "only"
        )
    scalings = [saved_scaling(f["local_parallel"], f["num_replicas"]) for f in (facts, own_facts)]
    if scalings[0] != scalings[1]:
        raise CheckpointError(
            f"{load_dir}/{tag} is of a merged model with the factor {scalings[0][0]:g} on its "
            f"dealt-out parts, this run gives them {scalings[1][0]:g}; keep replicas and their "
            "number, or export it and start from that folder"
        )
    engine.copies.collect(engine.global_steps)
    engine.replicas.before_load()
    # DeepSpeed 0.19 writes the bf16 optimizer's shards to ZeRO files even without ZeRO, but does
    # not look for them there
    unlooked_for = with_optimizer and engine.using_bf16_optimizer and not engine.zero_optimization()
    path, client_state = read(tag, load_optimizer_states and not unlooked_for)
    if unlooked_for:
        engine._load_zero_checkpoint(load_dir, tag)
    own_files = os.path.join(load_dir, tag) if with_optimizer else None
    engine.replicas.load(own_files, facts)
    engine.copies.load(own_files, engine.global_steps, engine.replica_id)
    return path, client_state


def facts_of(engine: Any) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    module = engine.module
    return {
        "step": engine.global_steps,
        "num_stages": engine.num_stages,
        "num_replicas": engine.dp_world_size,
        "segment_parts": module.segment_parts,
        "head_segments": sorted(head_segments(engine.section, engine.num_segments)),
        "local_parallel": engine.section.model_dump(mode="json"),
        "model": None if module.hf_config is None else config_dict(module.hf_config),
    }
