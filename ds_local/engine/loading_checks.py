"""Is what a checkpoint holds what this run can take? Asked on each rank before a weight changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_local.checkpoints.facts import segments_of_stages
from ds_local.engine.moving import AFRESH, Move
from ds_local.engine.saving import facts_of
from ds_local.engine.updates import StageUpdates
from ds_local.errors import CheckpointError, MoveError
from ds_local.links.agreement import gather
from ds_local.outputs.checkpoint_names import BF16_SHARD_FILE, HEAD_FILE, SHARD_FILE, STAGE_FILE
from ds_local.replicas.cuts import saved_scaling
from ds_local.replicas.head_copies import copies_file

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
_BY_GROUP = {"base_lrs", "min_lrs", "max_lrs"}  # of torch's schedulers: one a parameter group
_OF_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


def same_scheduler(facts: Mapping[str, Any], engine: StageUpdates) -> bool:
    """Is the checkpoint's scheduler of this run's kind, as far as is known?"""
    own = facts_of(engine)["scheduler"]
    return (
        own is None or (facts["format"] < 2 and not facts["scheduler"]) or facts["scheduler"] == own
    )


class Checks:
    """What this rank would read, against what it has."""

    def __init__(
        self,
        engine: StageUpdates,
        place: Path,
        facts: Mapping[str, Any],
        changes: Mapping[str, tuple[Any, Any]],
        trained: Mapping[str, Sequence[str]],
        strict: bool,
        with_optimizer: bool,
    ) -> None:
        self.engine, self.place, self.facts = engine, place, facts
        self.changes, self.trained = changes, trained
        self.with_optimizer = with_optimizer
        self.strict = strict or bool(trained)  # what moves is found by name
        self.own_facts = facts_of(engine)
        self.move: Move | None = None
        self.skipped_steps = 0
        self._heads: dict[str, str | None] = {}
        # a segment's earlier weights are of use to the same segment alone
        other = {"cut", "precision"} & changes.keys()
        self.files_ahead: Collection[str] = () if other else facts["files"]

    def run(self, with_scheduler: bool) -> list[str]:
        """What will not be loaded, a sentence each.

        Raises:
            CheckpointError: naming the first thing that does not fit.
        """
        self._check_layout()
        engine, module = self.engine, self.engine.module
        self._heads = module.check_state_dir(
            str(self.place), engine.checkpoint_engine, self.strict, engine.replicas.whole_shape
        )
        state = self._state()
        self.skipped_steps = state["skipped_steps"]
        if with_scheduler:
            self._check_scheduler(state["lr_scheduler"])
        if self.with_optimizer:
            if self.trained:
                afresh = [int(segment) for segment, file in self._heads.items() if file is None]
                self.move = Move(engine, self.look, self.facts, self.trained, afresh)
                self.move.check()
            elif engine.zero_optimization() or engine.using_bf16_optimizer:
                self._check_shards()
            else:
                self._check_optimizer(state["optimizer"])
            engine.copies.check(self.look, self.copies_file)
            return self._ahead() + engine.replicas.check(self.look, self.facts)
        return []

    def heads_in_words(self) -> str:
        """Which heads start afresh, and which of the checkpoint's are of no use. A collective
        call."""
        parts = self.engine.module.segment_parts
        own = {
            parts[int(segment) + 1]: file and Path(file).name
            for segment, file in self._heads.items()
        }
        everybodys = {cut: file for found in gather(own) for cut, file in found.items()}
        afresh = sorted(cut for cut, file in everybodys.items() if file is None)
        theirs = self.facts["segment_parts"][1:]
        there = {HEAD_FILE.format(number): cut for number, cut in enumerate(theirs)}
        used = everybodys.values()
        unused = sorted(
            there[name] for name in self.facts["files"] if name in there and name not in used
        )
        said = []
        if afresh:
            said.append(f"the {_heads(afresh)} {_plural(afresh, 'starts', 'start')} afresh")
        if unused:
            is_are = _plural(unused, "is", "are")
            said.append(f"the checkpoint's {_heads(unused)} {is_are} left out")
        return ", ".join(said)

    def copies_file(self, segment: int) -> str | None:
        """Of the copies that are on their way to the head of a segment of this run."""
        if self._heads.get(str(segment)) is None:
            return None
        apart = self.facts["local_parallel"]["replicas"]["sync"] != "gradients"
        if apart and "replicas" in self.changes:
            return None  # what a replica had of its own is left out
        cut = self.engine.module.segment_parts[segment + 1]
        replica = self.engine.replica_id if apart else 0
        name = copies_file(self.facts["segment_parts"].index(cut) - 1, replica)
        return name if name in self.facts["files"] else None

    def _ahead(self) -> list[str]:
        """What is said where the weights of what ran ahead are not there, or do not fit."""
        engine, step = self.engine, self.facts["step"]
        stash, schedule = engine.executor.stash, engine.plan.schedule_at(step)
        fits = stash.check(self.look, self.files_ahead, schedule)
        if fits or not schedule.leads or engine.starts_afresh_at(step):
            return []
        return [
            f"{self.place} has nothing that runs ahead as it does here: forwards start afresh, on "
            "the weights that are loaded"
        ]

    def look(self, name: str) -> dict[str, Any]:
        """The content of a file, without reading its tensors."""
        if name not in self.facts["files"]:
            raise CheckpointError(f"{self.place} has no {name}; {AFRESH}")
        found = self.engine.checkpoint_engine.look(str(self.place / name))
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.place / name} holds no dict; use another checkpoint")
        return found

    def _check_layout(self) -> None:
        theirs_of, own_of = (_part(facts) for facts in (self.facts, self.own_facts))
        if theirs_of != own_of:
            raise CheckpointError(
                f"{self.place} is of {theirs_of}, this is {own_of}; a checkpoint of all units is "
                "made by ds-local gather"
            )
        layers, own_layers = (f["segment_parts"][-1] for f in (self.facts, self.own_facts))
        if layers != own_layers:
            raise CheckpointError(
                f"{self.place} is of another model: {layers} layers, this run has {own_layers}; "
                "start a new run, or give the same model"
            )
        if self.with_optimizer and "optimizer" in self.changes:
            theirs, ours = self.changes["optimizer"]
            raise MoveError(
                f"{self.place} has the state of the optimizer {theirs}, this run has {ours}; keep "
                f"the optimizer, or {AFRESH}"
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
        """Of the stage that had this one's first layer: counters, scheduler, and the optimizer
        where nothing is sharded."""
        first, parts = self.engine.module.layer_numbers[0], self.facts["segment_parts"]
        segment = sum(start <= first for start in parts) - 1
        stages = segments_of_stages(self.facts)
        stage = next(stage for stage, own in enumerate(stages) if segment in own)
        name = STAGE_FILE.format(stage)
        state = self.look(name)
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
        own = scheduler.state_dict()
        fits = isinstance(saved, dict) and own.keys() <= saved.keys()
        for key in _BY_GROUP & own.keys() if fits else ():  # stages may have other groups
            fits &= isinstance(saved[key], list) and len(saved[key]) == len(own[key])
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
            raise CheckpointError(f"{what}: groups of {counts} parameters; {AFRESH}")
        parameters = [parameter for group in groups for parameter in group["params"]]
        whole_shape = self.engine.replicas.whole_shape
        for index, values in state.items():
            for key in _OF_PARAMETERS:
                wanted = whole_shape(parameters[index]) if index in range(len(parameters)) else None
                if key in values and getattr(values[key], "shape", None) != wanted:
                    raise CheckpointError(
                        f"{what}: {key} of parameter {index} has another shape; {AFRESH}"
                    )

    def _check_shards(self) -> None:
        engine, optimizer = self.engine, self.engine.optimizer
        file = BF16_SHARD_FILE if engine.bfloat16_enabled() else SHARD_FILE
        name = file.format(engine.replica_id, engine.module.stage)
        shard = self.look(name)
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
                f"{AFRESH}"
            )


def _heads(cuts: Sequence[int]) -> str:
    *first, last = map(str, cuts)
    which = f"{', '.join(first)} and {last}" if first else last
    return f"{_plural(cuts, 'head', 'heads')} after {which} {'layer' if last == '1' else 'layers'}"


def _plural(several: Sequence[Any], one: str, more: str) -> str:
    return one if len(several) == 1 else more


def _part(facts: Mapping[str, Any]) -> str:
    """Of the pipeline, in words."""
    return "the whole pipeline" if facts.get("unit") is None else f"unit {facts['unit']} alone"
