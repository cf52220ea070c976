"""A run whose units of stages are jobs of their own: what each is, and how it comes back."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol

from ds_local.config.deepspeed import batch_sizes, bf16_enabled, zero_stage
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.data.dataset import BatchShape, TokenData, validation_batches
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.errors import ConfigError, RunError
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.units import KEY, Unit, folder_of, unit_of


class Loop(Protocol):
    """What is needed of the loop over steps."""

    args: Namespace
    engine: LocalPipelineEngine
    data: TokenData
    shape: BatchShape
    say: Callable[[str], None]  # on the console of the first rank

    @property
    def step(self) -> int: ...

    def is_due(self, step: int) -> bool: ...


_WHOLE = {  # options that look at the whole model
    "stop_after_worse": "--stop-after-worse",
    "keep_best": "--keep-best",
    "sample_tokens": "--sample-tokens",
    "profile": "--profile",
    "dry_run": "--dry-run",
}


def check_unit(args: Namespace, section: LocalParallelConfig) -> None:
    """The options of a unit and the config's go together.

    Raises:
        ConfigError: naming both.
    """
    reconnects = section.link.reconnect_seconds
    if args.unit is None and reconnects:
        raise ConfigError(
            f"{KEY} is {reconnects:g}, so every unit of stages is a job of its own: give this one "
            "its number with --unit, or leave reconnect_seconds out"
        )
    if args.unit is None:
        if args.replicas > 1 or args.replica:
            raise ConfigError(
                f"--replicas {args.replicas} and --replica {args.replica} say which copy of a unit "
                "this job is, but there is no --unit; leave them out (replicas of one job are its "
                "processes by its stages), or give --unit"
            )
        return
    if not reconnects:
        raise ConfigError(
            f"--unit {args.unit} is a job of its own, whose neighbours must know how long to wait "
            f"when it dies; set {KEY}, such as 600"
        )
    for name, option in _WHOLE.items():
        if getattr(args, name):
            raise ConfigError(
                f"{option} needs the whole model in one job, but --unit {args.unit} is given; "
                "leave one out"
            )


def start_of_unit(
    args: Namespace, config: dict[str, Any], section: LocalParallelConfig, processes: int
) -> tuple[Unit, dict[str, Any]]:
    """The unit that this job is, and the config of its engine.

    Args:
        processes: of this job.

    Raises:
        ConfigError: when the options do not make a unit.
    """
    stages = args.num_stages or section.num_stages
    if not stages:
        raise ConfigError(
            f"--unit {args.unit} is one of several jobs, so the number of stages cannot be counted "
            f"from its processes; give --num-stages, or {SECTION}.num_stages"
        )
    size, number = batch_sizes(config, args.replicas)
    plan = RunPlan.of(section, stages, number)
    unit = unit_of(section, plan, args.unit, processes, args.replica, args.replicas)
    check_precision(config, unit)
    if unit.num_replicas > 1 and section.loss_weighting == "token":
        raise ConfigError(
            f'{SECTION}.loss_weighting is "token", but --replicas {unit.num_replicas} are jobs '
            "that average gradients without the numbers of each other's tokens; leave it out, or "
            "use one replica"
        )
    own = {key: value for key, value in config.items() if key != "train_batch_size"}
    own |= {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": number}
    return replace(unit, meets_in=str(Path(args.output).absolute())), own


def check_precision(config: Mapping[str, Any], unit: Unit) -> None:
    """Replicas that are jobs average the gradients of plain optimizers alone.

    Raises:
        ConfigError: naming the key.
    """
    bf16 = bf16_enabled(config)
    if unit.num_replicas > 1 and (bf16 or zero_stage(config)):
        key = "bf16" if bf16 else "zero_optimization"
        raise ConfigError(
            f"{KEY} with --replicas {unit.num_replicas} averages gradients in fp32 without ZeRO, "
            f"but {key} is on; turn it off, or use one replica"
        )


def name_of_folder(args: Namespace) -> str:
    """Of a unit's run, in that of the whole."""
    return folder_of(args.unit, args.replica, args.replicas)


def with_facts(unit: Unit, facts: Mapping[str, Any], args: Namespace) -> Unit:
    """What all units must have the same, as one word."""
    said = {
        "config": facts["config"],
        "model": facts["model"],
        "data": facts["data"]["fingerprint"],
        "replicas": args.replicas,
        "lengths": [args.max_steps, args.eval_every, args.eval_sequences, args.eval_ema],
    }
    text = json.dumps(said, sort_keys=True, default=str)
    return replace(unit, facts=hashlib.sha256(text.encode()).hexdigest())


def check_flapping(recorded: Mapping[str, Any] | None, limit: int) -> None:
    """A unit that is started again and again is refused, so that somebody looks.

    Args:
        recorded: its run.json, if there is one.
        limit: starts in an hour; 0: any number.

    Raises:
        RunError: when there were as many already.
    """
    hour_ago = datetime.now(timezone.utc) - timedelta(hours=1)
    starts = (recorded or {}).get("starts") or []
    recent = [one["time"] for one in starts if datetime.fromisoformat(one["time"]) > hour_ago]
    if limit and len(recent) >= limit:
        raise RunError(
            f"this unit was started {len(recent)} times within the last hour, first at "
            f"{recent[0]}; see its log for what ends it, then raise --most-starts-per-hour"
        )


def catch_up(loop: Loop, first: int, batches: Iterator[Any] | None) -> None:
    """Give the units above what they still lack of steps that this unit has done, or tell which
    steps it has lost.

    Args:
        first: the step whose messages come first.
        batches: from that step on, where data is read.
    """
    engine, own = loop.engine, loop.step
    unit = engine.module.unit
    if first > own and unit is not None and unit.num_replicas == 1:
        loop.say(f"{engine.module.unit} lost {first - own} steps: {own + 1:,} to {first:,}")
        engine.skip_to(first)
    for step in range(first, own):
        if loop.is_due(step):
            serve_validation(loop, step)
        engine.serve_batch(step, batches)
    if first < own:
        loop.say(
            f"{engine.module.unit} served steps {first + 1:,} to {own:,} again, which it has in "
            "its weights"
        )


def join_replicas(loop: Loop) -> None:
    """Become one of the replicas of this unit, with their weights where they have done more."""
    engine = loop.engine
    group, unit = engine.units.group, engine.module.unit
    if group is None or unit is None:
        return
    step, state = group.join(loop.step)
    engine.units.tell_whether_others_go_on(len(group.members) > 1)  # before the first mean does
    if state is not None:
        folder, tag = state
        if folder.startswith("replica "):
            name = folder_of(unit.number, int(folder.split()[1]), unit.num_replicas)
            folder = str(Path(unit.meets_in, name, "checkpoints"))
        engine.load_checkpoint(folder, tag)
        loop.say(f"{unit} takes the weights of the other replicas after step {step}")


def serve_validation(loop: Loop, step: int) -> None:
    """The forwards of a validation, for the units above alone."""
    engine, args = loop.engine, loop.args
    batches = validation_batches(loop.data, loop.shape, args.eval_sequences)
    done, engine.global_steps = engine.global_steps, step
    try:
        with engine.average.in_place() if args.eval_ema else nullcontext():
            engine.eval_batch(iter(batches), num_micro_batches=len(batches))
    finally:
        engine.global_steps = done
