"""Loading: everything is compared with this run first, on all ranks, before a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from deepspeed.utils import logger

from ds_local.checkpoints.agreement import gather, together
from ds_local.checkpoints.facts import layout_changes, read_facts
from ds_local.checkpoints.folder import agreed_tag, latest_tag, locate
from ds_local.checkpoints.sums import verify
from ds_local.engine.finite import check_state
from ds_local.engine.safe_files import RESERVED
from ds_local.engine.saving import facts_of
from ds_local.engine.updates import StageUpdates
from ds_local.errors import CheckpointError
from ds_local.replicas.cuts import saved_scaling

WEIGHTS_ONLY = (
    "keep the layout, or load weights only: load_optimizer_states=False (step and schedule go on) "
    "or load_module_only=True; scripts/train.py --resume --allow-change layout"
)
_STATE = {  # of DeepSpeed's mp_rank files
    "module": object,
    "optimizer": object,
    "lr_scheduler": object,
    "dp_world_size": int,
    "mp_world_size": int,
    "global_steps": int,
    "skipped_steps": int,
    "ds_version": str,
}
_OF_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


def load(
    engine: StageUpdates,
    read: Callable[[str, bool], tuple[str | None, dict[str, Any]]],
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
    checks = _Checks(engine, place, facts, strict, with_optimizer)
    notes = gather(together(lambda: checks.run(load_scheduler and not load_module_only)))
    for note in dict.fromkeys(note for own in notes for note in own):
        if engine.global_rank == 0:
            logger.warning(note)
    engine.copies.collect(engine.global_steps)
    engine.executor.abandon()
    engine.replicas.before_load()
    # DeepSpeed 0.19 writes the bf16 optimizer's shards to ZeRO files even without ZeRO, but does
    # not look for them there
    unlooked_for = with_optimizer and engine.using_bf16_optimizer and not engine.zero_optimization()
    path, client_state = read(place.name, load_optimizer_states and not unlooked_for)
    if unlooked_for:
        engine.load_zero_checkpoint(load_dir, place.name)
    own_files = str(place) if with_optimizer else None
    engine.replicas.load(own_files, facts)
    engine.copies.load(own_files, engine.global_steps, engine.replica_id)
    engine.executor.stash.load(own_files, engine.plan.schedule_at(engine.global_steps))
    check_state(engine, f"with {place}", "use another checkpoint")
    # DeepSpeed gives whatever it did not use, its own notes among it
    return path, {key: value for key, value in client_state.items() if key not in RESERVED}


def load_what_fits(
    engine: StageUpdates, load_dir: str, tag: str | None, allowed: Collection[str]
) -> str:
    """Load a checkpoint as `load_checkpoint` does, without the optimizer's state or the scheduler's
    where that is of another kind and may be: with "layout" or "scheduler" among what is allowed.

    Returns:
        What starts afresh, in a sentence; "" when nothing does.
    """
    found = agreed_tag(load_dir, latest_tag if tag is None else lambda _: tag)
    facts = together(lambda: read_facts(locate(load_dir, str(found))))
    changed = layout_changes(facts, facts_of(engine)) if "layout" in allowed else None
    scheduler = "scheduler" not in allowed or same_scheduler(facts, engine)
    engine.load_checkpoint(
        load_dir,
        found,
        load_optimizer_states=changed is None,
        load_lr_scheduler_states=scheduler,
    )
    said = [] if changed is None else [f"the optimizer (it had {changed[0]}, now {changed[1]})"]
    said += [] if scheduler else ["the scheduler"]
    return f"{' and '.join(said)} starts afresh" if said else ""


def same_scheduler(facts: Mapping[str, Any], engine: StageUpdates) -> bool:
    """Is the checkpoint's scheduler of this run's kind, as far as is known?"""
    own = facts_of(engine)["scheduler"]
    return (
        own is None or (facts["format"] < 2 and not facts["scheduler"]) or facts["scheduler"] == own
    )


class _Checks:
    """What this rank would read, against what it has."""

    def __init__(
        self,
        engine: StageUpdates,
        place: Path,
        facts: Mapping[str, Any],
        strict: bool,
        with_optimizer: bool,
    ) -> None:
        self.engine, self.place, self.facts = engine, place, facts
        self.strict, self.with_optimizer = strict, with_optimizer
        self.own_facts = facts_of(engine)

    def run(self, with_scheduler: bool) -> list[str]:
        """What will not be loaded, a sentence each.

        Raises:
            CheckpointError: naming the first thing that does not fit.
        """
        self._check_layout()
        engine, module = self.engine, self.engine.module
        module.check_state_dir(
            str(self.place), engine.checkpoint_engine, self.strict, engine.replicas.whole_shape
        )
        state = self._state()
        if with_scheduler:
            self._check_scheduler(state["lr_scheduler"])
        if self.with_optimizer:
            if engine.zero_optimization() or engine.using_bf16_optimizer:
                self._check_shards()
            else:
                self._check_optimizer(state["optimizer"])
            engine.copies.check(self._look, self.facts["files"], engine.replica_id)
            return self._ahead() + engine.replicas.check(self._look, self.facts)
        return []

    def _ahead(self) -> list[str]:
        """What is said where the weights of what ran ahead are not there, or do not fit."""
        engine, step = self.engine, self.facts["step"]
        stash, schedule = engine.executor.stash, engine.plan.schedule_at(step)
        fits = stash.check(self._look, self.facts["files"], schedule)
        if fits or not schedule.leads or engine.starts_afresh_at(step):
            return []
        return [
            f"{self.place} has nothing that runs ahead as it does here: forwards start afresh, on "
            "the weights that are loaded"
        ]

    def _look(self, name: str) -> dict[str, Any]:
        """The content of a file, without reading its tensors."""
        if name not in self.facts["files"]:
            raise CheckpointError(f"{self.place} has no {name}; {WEIGHTS_ONLY}")
        found = self.engine.checkpoint_engine.look(str(self.place / name))
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.place / name} holds no dict; use another checkpoint")
        return found

    def _check_layout(self) -> None:
        layers, own_layers = (f["segment_parts"][-1] for f in (self.facts, self.own_facts))
        if layers != own_layers:
            raise CheckpointError(
                f"{self.place} is of another model: {layers} layers, this run has {own_layers}; "
                "start a new run, or give the same model"
            )
        changed = layout_changes(self.facts, self.own_facts) if self.with_optimizer else None
        if changed is not None:
            raise CheckpointError(
                f"{self.place} has {changed[0]}, this run has {changed[1]}; {WEIGHTS_ONLY}"
            )
        theirs, own = (
            saved_scaling(f["local_parallel"], f["num_replicas"])
            for f in (self.facts, self.own_facts)
        )
        if theirs != own:
            raise CheckpointError(
                f"{self.place} is of a merged model with the factor {theirs[0]:g} on its "
                f"dealt-out parts, this run gives them {own[0]:g}; keep replicas and their "
                "number, or export it and start from that folder"
            )

    def _state(self) -> dict[str, Any]:
        """Of this stage: counters, scheduler, and the optimizer where nothing is sharded."""
        same = self.facts["num_stages"] == self.engine.num_stages
        name = f"mp_rank_{self.engine.stage_id if same else 0:02d}_model_states.pt"
        state = self._look(name)
        what = f"{self.place / name} is not what ds_local writes"
        for key, kind in _STATE.items():
            if key not in state or not isinstance(state[key], kind):
                raise CheckpointError(
                    f"{what}: {key!r} is missing or wrong; use another checkpoint"
                )
        if state["global_steps"] != self.facts["step"]:
            raise CheckpointError(
                f"{what}: it is of step {state['global_steps']}, ds_local.json of step "
                f"{self.facts['step']}; use another checkpoint"
            )
        return state

    def _check_scheduler(self, saved: Any) -> None:
        scheduler = self.engine.lr_scheduler
        if scheduler is None:
            return
        fits = isinstance(saved, dict) and scheduler.state_dict().keys() <= saved.keys()
        if not fits or not same_scheduler(self.facts, self.engine):
            theirs = self.facts["scheduler"] or ("no scheduler" if saved is None else "another")
            raise CheckpointError(
                f"{self.place} has {theirs}, this run has {type(scheduler).__name__}; keep the "
                "scheduler, or start it afresh: load_lr_scheduler_states=False "
                "(scripts/train.py --resume --allow-change scheduler)"
            )

    def _check_optimizer(self, saved: Any) -> None:
        what = f"{self.place} has another optimizer"
        groups = self.engine.optimizer.param_groups
        try:
            counts = [len(group["params"]) for group in saved["param_groups"]]
            state = {index: dict(values) for index, values in saved["state"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{what}: its state is not what ds_local writes") from None
        if counts != [len(group["params"]) for group in groups]:
            raise CheckpointError(f"{what}: groups of {counts} parameters; {WEIGHTS_ONLY}")
        parameters = [parameter for group in groups for parameter in group["params"]]
        whole_shape = self.engine.replicas.whole_shape
        for index, values in state.items():
            for key in _OF_PARAMETERS:
                wanted = whole_shape(parameters[index]) if index in range(len(parameters)) else None
                if key in values and getattr(values[key], "shape", None) != wanted:
                    raise CheckpointError(
                        f"{what}: {key} of parameter {index} has another shape; {WEIGHTS_ONLY}"
                    )

    def _check_shards(self) -> None:
        engine, optimizer = self.engine, self.engine.optimizer
        prefix = "bf16_" if engine.bfloat16_enabled() else ""
        replica = engine.replica_id
        name = f"{prefix}zero_pp_rank_{replica}_mp_rank_{engine.stage_id:02d}_optim_states.pt"
        shard = self._look(name)
        own = (
            optimizer.fp32_groups_flat_partition
            if engine.using_bf16_optimizer
            else optimizer.single_partition_of_fp32_groups
        )
        what = f"{self.place / name} is not what ds_local writes"
        try:
            state = shard["optimizer_state_dict"]
            saved = [tensor.numel() for tensor in state["single_partition_of_fp32_groups"]]
            paddings = list(state["group_paddings"])
            _ = state["base_optimizer_state"], state["ds_version"]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{what}: {error}; use another checkpoint") from None
        fits = len(saved) == len(own) and all(
            part.numel() - padding <= count <= part.numel()
            for part, count, padding in zip(own, saved, paddings, strict=False)
        )
        if not fits:
            raise CheckpointError(
                f"{what}: shards of {saved} weights, this run has {[p.numel() for p in own]}; "
                f"{WEIGHTS_ONLY}"
            )
