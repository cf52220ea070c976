"""A run from its start to its end: inputs checked, ranks met, model built; `steps` trains.

`scripts/train.py` parses the arguments and calls `train`. A run folder holds run.json (what ran),
metrics.jsonl (what came of it), checkpoints/, report.html and loss.png.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from ds_local.checkpoints.folder import agreed_tag, clean, newest_tag
from ds_local.cluster import start_check as cluster
from ds_local.cluster.edges import describe_hosts, stage_hosts
from ds_local.cluster.surroundings import builds_of, complete_environment
from ds_local.config.deepspeed import batch_sizes
from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.files import local_parallel
from ds_local.config.schema import LocalParallelConfig
from ds_local.data.dataset import BatchShape
from ds_local.data.tokenizers import check_same_tokenizer
from ds_local.engine.causal_lm import causal_lm
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.initialize import initialize
from ds_local.engine.loading import load_what_fits
from ds_local.links import notices
from ds_local.links.agreement import together
from ds_local.links.failures import Failures, meeting
from ds_local.links.logs import LOG, start_log
from ds_local.links.waiting import is_late, is_lost
from ds_local.model.pretrained import find_weights
from ds_local.schedules.run_plan import RunPlan
from ds_local.training.banner import banner, forecast
from ds_local.training.callbacks import Callback, Validation, check_callbacks
from ds_local.training.dry_run import dry_run
from ds_local.training.inputs import facts_of_start, layout_of, length_of, read_inputs
from ds_local.training.run_folder import RunFolder, opened, tokenizer_test
from ds_local.training.signals import Signals
from ds_local.training.steps import Loop
from ds_local.training.units import check_flapping, name_of_folder, start_of_unit, with_facts

# arguments that decide when stages meet: they must be the same on every rank
_MEETINGS = (
    "max_steps",
    "eval_every",
    "eval_sequences",
    "eval_ema",
    "sample_tokens",
    "save_every",
    "keep_last",
    "keep_best",
    "stop_after_worse",
    "dry_run",
    "resume",
    "profile",
    "from_scratch",
    "allow_change",
)


def train(
    args: Namespace, signals: Signals | None = None, callbacks: Sequence[Callback] = ()
) -> Validation | None:
    """Run `scripts/train.py`; see there for the arguments.

    Args:
        signals: are to end the run from the first step on; None: the caller sees to that, with
            `LocalPipelineEngine.request_stop`.
        callbacks: told what happens; see `callbacks.Callback`.

    Returns:
        The last validation, if there was one.

    Raises:
        ConfigError, DataError, CheckpointError, ...: in a sentence, before any training, with
        nothing lost.
    """
    check_callbacks(callbacks)
    complete_environment()
    is_first = os.environ.get("RANK", "0") == "0"
    output = args.output
    if args.unit is not None:
        output = str(Path(args.output, name_of_folder(args)))
    with (
        opened(output, is_first, _say_first if is_first else _say_nothing, not args.dry_run) as run,
        meeting("the run"),
    ):
        return _train(args, run, signals, callbacks)


def _train(
    args: Namespace, run: RunFolder, signals: Signals | None, callbacks: Sequence[Callback]
) -> Validation | None:
    asked, tag = dict(vars(args)), run.begins_at(args.resume)
    args.resume = tag is not None  # a supervisor's one command line starts a run and continues it
    if asked["resume"] and not args.resume:
        run.say(f"nothing to resume in {run.path}: the run starts at its beginning")
    config, data, hf_config = read_inputs(args)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    section = local_parallel(config)
    unit = None
    if args.unit is not None:
        unit, config = start_of_unit(args, config, section, world_size)
    stages, replicas = (
        (unit.num_stages, unit.num_replicas)
        if unit
        else num_stages_and_replicas(section, world_size)
    )
    micro_batch_size, num_micro_batches = batch_sizes(config, 1 if unit else replicas)
    plan = RunPlan.of(section, stages, num_micro_batches)
    _ = plan.schedules  # refuses what does not fit
    per_step = micro_batch_size * num_micro_batches * replicas
    length = length_of(args, data, per_step)
    args.max_steps = asked["max_steps"] = length.steps
    facts = facts_of_start(args, asked, config, hf_config, data, replicas)
    if unit is not None:
        unit = with_facts(unit, facts, args)
        check_flapping(run.recorded(), args.most_starts_per_hour)
    if tag is not None:
        test = tokenizer_test(check_same_tokenizer, data.tokenizer_folder)
        run.check_same(tag, facts, args.allow_change, test)
    settings, here = [config, facts["model"]], (world_size, 1) if unit else (stages, replicas)
    _check_start(args, section, settings, here)

    weights = None if args.from_scratch or args.resume else find_weights(args.model)
    how: dict[str, Any] = {"weights": weights, "token_counts": data.folder, "unit": unit}
    model = causal_lm(hf_config, stages, config, data.seq_len, **how)
    engine = initialize(model=model, config=config)[0]
    if args.resume:
        _load(run, engine, args.allow_change)
        if unit is None:  # units are at different steps
            length = length.resumed(engine.global_steps, engine.global_samples, args.epochs)
            args.max_steps = asked["max_steps"] = length.steps
    replica = unit.replica if unit else engine.replica_id
    shape = BatchShape(micro_batch_size, num_micro_batches, replicas, replica)
    with engine.meeting("the start of the run"):
        hosts = stage_hosts(model.stage)
        phases = forecast(plan, hf_config, model.segment_parts, data.seq_len)
        facts |= layout_of(engine, data, hosts, phases)
        told = banner(facts, phases, length, engine.global_steps, engine.gradient_clipping(), args)
        run.say(f"{describe_hosts(hosts)}\n{told}")
        if args.dry_run:
            run.say(dry_run(engine, data, shape, args))
            return None
        together(lambda: run.start(facts, engine.global_steps, tag, data.tokenizer_folder))
        clean(run.checkpoints)
    start_log(run.path / "logs", model.stage, engine.global_rank)
    if signals is not None:
        signals.stop_with(engine.request_stop, may_die_alone=unit is not None)
    return _run(Loop(args, run, engine, data, shape, callbacks), engine)


def _load(run: RunFolder, engine: LocalPipelineEngine, allowed: Sequence[str]) -> None:
    """Go on from the run's latest checkpoint. A collective call."""
    with engine.meeting("the loading of a checkpoint"):
        found = agreed_tag(run.checkpoints, newest_tag)
        moved = load_what_fits(engine, str(run.checkpoints), found, allowed)
    run.say(f"resuming at step {engine.global_steps}{moved and '; ' + moved}")


def _run(loop: Loop, engine: LocalPipelineEngine) -> Validation | None:
    """Returns the last validation, if there was one."""
    try:
        with engine.meeting("what is done between steps"):
            loop.run()
    except BaseException:
        loop.note_last_event()
        raise
    finally:
        loop.close()
    return loop.validation


def _check_start(
    args: Namespace, section: LocalParallelConfig, settings: list[Any], here: tuple[int, int]
) -> None:
    """All ranks are there and agree on what they were given.

    Args:
        here: stages and replicas of this job.
    """
    if here == (1, 1) or "MASTER_ADDR" not in os.environ:
        return
    neighbours = section.layout.neighbours(int(os.environ["RANK"]), *here)
    meetings = {key: value for key, value in vars(args).items() if key in _MEETINGS}
    own = cluster.own_facts([*settings, meetings], args.data)
    limit = section.layout.start_timeout_seconds
    cluster.check_start(own, neighbours, limit, builds=builds_of(settings[0]))


def _say_first(sentence: str) -> None:
    """On the first rank, before and between progress lines."""
    print(sentence, flush=True)


def _say_nothing(sentence: str) -> None:
    """On all others."""


def end_quietly() -> None:
    """Leave together, so that no rank sees a neighbour's connection close while it still works."""
    if dist.is_initialized():
        with meeting("the end of the run"):
            try:
                dist.barrier()
            except RuntimeError as error:
                known = Failures(notices.current()).first
                if known or not is_lost(error) or is_late(error):
                    raise
                # whoever is gone had nothing left to do, and those it took along have ended well
                LOG.info("all is done; the last to leave: %s", error)
        notices.end()
        dist.destroy_process_group()
