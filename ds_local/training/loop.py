"""The training loop: build, train, evaluate every segment, save, resume, stop when told to.

`scripts/train.py` parses the arguments and calls `train`. A run folder holds run.json (what ran),
metrics.jsonl (what came of it), checkpoints/ and loss.png.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import distributed as dist
from tqdm import tqdm

from ds_local.checkpoints.agreement import gather, together
from ds_local.checkpoints.folder import agreed_tag, clean, newest_tag
from ds_local.checkpoints.metrics_file import MetricsFile
from ds_local.cluster import start_check as cluster
from ds_local.cluster.edges import describe_hosts, stage_hosts
from ds_local.cluster.surroundings import builds_of, complete_environment
from ds_local.config.command_line import read_settings
from ds_local.config.deepspeed import batch_sizes
from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.files import local_parallel
from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.data.tokenizers import check_same_tokenizer
from ds_local.engine.causal_lm import causal_lm
from ds_local.engine.deepspeed_checks import checked
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.initialize import initialize
from ds_local.engine.loading import load_what_fits
from ds_local.engine.optimizer_checks import check_client_parts
from ds_local.engine.recorder import Recorder
from ds_local.engine.reports import SegmentReport
from ds_local.errors import ConfigError, SaveError
from ds_local.links import notices
from ds_local.links.failures import meeting
from ds_local.links.logs import LOG, say, start_log
from ds_local.model import families
from ds_local.model.flops import auxiliary_shares
from ds_local.model.pretrained import find_weights
from ds_local.outputs import reason
from ds_local.schedules.replay import grid_of
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Schedule
from ds_local.training import diagnostics, profiling
from ds_local.training.pictures import (
    draw_diagnostics,
    draw_losses,
    summary_table,
    tokens_per_second,
)
from ds_local.training.run_folder import RunFolder, opened, tokenizer_test
from ds_local.training.signals import Signals

# arguments that decide when stages meet: they must be the same on every rank
_MEETINGS = (
    "max_steps",
    "eval_every",
    "eval_sequences",
    "save_every",
    "resume",
    "profile",
    "from_scratch",
    "allow_change",
)
_RECENT = 50  # reports that the pace on the progress line is of
VOCABULARY_PADDING = (
    128  # a model's vocabulary may be rounded up by less than this, as is usual for speed
)


def train(args: Namespace, signals: Signals | None = None) -> None:
    """Run `scripts/train.py`; see there for the arguments.

    Args:
        signals: are to end the run from the first step on; None: the caller sees to that, with
            `LocalPipelineEngine.request_stop`.

    Raises:
        ConfigError, DataError, CheckpointError, ...: in a sentence, before any training, with
        nothing lost.
    """
    complete_environment()
    is_first = os.environ.get("RANK", "0") == "0"
    with (
        opened(args.output, is_first, _say_first if is_first else _say_nothing) as run,
        meeting("the run"),
    ):
        _train(args, run, signals)


def _train(args: Namespace, run: RunFolder, signals: Signals | None) -> None:
    asked, tag = dict(vars(args)), run.begins_at(args.resume)
    args.resume = tag is not None  # a supervisor's one command line starts a run and continues it
    if asked["resume"] and not args.resume:
        run.say(f"nothing to resume in {run.path}: the run starts at its beginning")
    config, data, hf_config = read_inputs(args)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    section = local_parallel(config)
    stages, replicas = num_stages_and_replicas(section, world_size)
    micro_batch_size, num_micro_batches = batch_sizes(config, replicas)
    _ = RunPlan.of(section, stages, num_micro_batches).schedules  # refuses what does not fit
    facts = _facts_of_start(args, asked, config, hf_config, data, replicas)
    if tag is not None:
        test = tokenizer_test(check_same_tokenizer, data.tokenizer_folder)
        run.check_same(tag, facts, args.allow_change, test)
    if world_size > 1 and "MASTER_ADDR" in os.environ:
        neighbours = section.layout.neighbours(int(os.environ["RANK"]), stages, replicas)
        meetings = {key: value for key, value in vars(args).items() if key in _MEETINGS}
        own = cluster.own_facts([config, families.config_dict(hf_config), meetings], args.data)
        limit = section.layout.start_timeout_seconds
        cluster.check_start(own, neighbours, limit, builds=builds_of(config))

    weights = None if args.from_scratch or args.resume else find_weights(args.model)
    model = causal_lm(hf_config, stages, config, data.seq_len, weights=weights)
    engine = initialize(model=model, config=config)[0]
    if args.resume:
        with engine.meeting("the loading of a checkpoint"):
            found = agreed_tag(run.checkpoints, newest_tag)
            afresh = load_what_fits(engine, str(run.checkpoints), found, args.allow_change)
        run.say(f"resuming at step {engine.global_steps}{afresh and '; ' + afresh}")
    shape = BatchShape(micro_batch_size, num_micro_batches, replicas, engine.replica_id)
    with engine.meeting("the start of the run"):
        hosts = stage_hosts(engine.stage_id)
        facts |= _layout_of(engine, data, hosts)
        run.say(describe_hosts(hosts))
        together(lambda: run.start(facts, engine.global_steps, tag, data.tokenizer_folder))
        clean(run.checkpoints)
    start_log(run.path / "logs", engine.stage_id, engine.global_rank)
    if signals is not None:
        signals.stop_with(engine.request_stop)
    loop = _Loop(args, run, engine, data, shape)
    try:
        with engine.meeting("what is done between steps"):
            loop.run()
    except BaseException:
        loop.note_last_event()
        raise
    finally:
        loop.bar.close()


def read_inputs(args: Namespace) -> tuple[dict[str, Any], TokenData, Any]:
    """Config, data and model of a run, checked against each other.

    Raises:
        ConfigError: naming the two values that contradict each other.
    """
    config, _ = checked(read_settings(args))
    check_client_parts(config, None, None)
    # the files are compared with their checksums once on each host
    data = TokenData(args.data, verify=os.environ.get("LOCAL_RANK", "0") == "0")
    hf_config = families.load_model_config(args.model)
    padding = hf_config.vocab_size - data.vocab_size
    weights = None if args.from_scratch or args.resume else find_weights(args.model)
    same_tokens = weights is not None and check_same_tokenizer(weights, data.tokenizer_folder)
    if padding < 0 or (padding >= VOCABULARY_PADDING and not same_tokens and not args.resume):
        raise ConfigError(
            f"{args.model} has vocab_size {hf_config.vocab_size} but the tokenizer in {args.data} "
            f"has {data.vocab_size} tokens; set vocab_size to {data.vocab_size}, or prepare the "
            "data with another tokenizer"
        )
    if data.seq_len > families.num_positions(hf_config):
        raise ConfigError(
            f"{args.data} has sequences of {data.seq_len} tokens but {args.model} takes at most "
            f"{families.num_positions(hf_config)}; prepare the data with a smaller --seq-len"
        )
    hf_config.bos_token_id = hf_config.eos_token_id = data.facts["eos_token_id"]
    return config, data, hf_config


def _facts_of_start(
    args: Namespace,
    asked: Mapping[str, Any],
    config: dict[str, Any],
    hf_config: Any,
    data: TokenData,
    replicas: int,
) -> dict[str, Any]:
    """What run.json says of a start before there is an engine."""
    return {
        "arguments": asked,
        "config": config,
        "model": families.config_dict(hf_config),
        "weights": _name_of_weights(args),
        "data": {"folder": str(data.folder), **data.facts},
        "layout": {"replicas": replicas},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": {
            name: version(name)
            for name in ("ds_local", "torch", "deepspeed", "transformers", "datasets")
        }
        | {"python": platform.python_version()},
    }


def _layout_of(
    engine: LocalPipelineEngine, data: TokenData, hosts: dict[str, Any]
) -> dict[str, Any]:
    """What run.json says of the engine."""
    schedules = engine.plan.schedules
    return {
        "layout": {
            "stages": engine.num_stages,
            "replicas": engine.dp_world_size,
            "segments": engine.num_segments,
            "segment_parts": engine.module.segment_parts,
            "auxiliary_flops": [_shares(engine, schedule, data.seq_len) for schedule in schedules],
            "hosts": hosts,
        },
        "routes": [list(dict.fromkeys(map(str, s.rows))) for s in schedules],
        "schedules": [grid_of(s).splitlines() for s in schedules],
        "machine": {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "device": str(engine.device),
        },
    }


def _shares(engine: LocalPipelineEngine, schedule: Schedule, seq_len: int) -> list[float]:
    shares = auxiliary_shares(
        engine.module.hf_config, engine.section, schedule, engine.module.segment_parts, seq_len
    )
    return [round(share, 4) for share in shares]


def _name_of_weights(args: Namespace) -> str | None:
    """Of the pretrained weights that a run started from: a folder's or hub name."""
    if args.from_scratch or args.resume or find_weights(args.model) is None:
        return None
    return Path(args.model).resolve().name if Path(args.model).exists() else args.model


class _Loop:
    """Steps until done; rank 0 keeps the books."""

    def __init__(
        self,
        args: Namespace,
        run: RunFolder,
        engine: LocalPipelineEngine,
        data: TokenData,
        shape: BatchShape,
    ) -> None:
        self.args, self.run_folder, self.engine, self.data = args, run.path, engine, data
        self.lock = run.lock
        self.shape = shape
        self.is_first = engine.global_rank == 0
        self.tokens_per_step = shape.per_step * data.seq_len
        self.metrics = MetricsFile(run.path / "metrics.jsonl")
        self.metrics_problem = ""
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0
        self.first_step = engine.global_steps
        self.recent: deque[list[dict[str, Any]]] = deque(maxlen=_RECENT)  # rows of reports
        if self.is_first:
            self.earlier_seconds, damaged = self.metrics.keep_until(engine.global_steps)
            if damaged:
                run.say(
                    f"{self.metrics.path} had {damaged} damaged lines, now in "
                    f"{self.metrics.damaged_path.name}; all others are kept"
                )
            engine.reports.listeners.append(self._on_report)
        engine.events.say = _tell
        self.bar = tqdm(
            total=args.max_steps,
            initial=engine.global_steps,
            disable=not self.is_first,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def run(self) -> None:
        engine, args = self.engine, self.args
        batches = None
        if engine.is_first_stage():
            batches = training_batches(
                self.data, engine.section.seed, engine.global_steps, self.shape
            )
        if args.profile:
            engine.recorder = Recorder(engine.device)
        engine.ends_after(args.max_steps)
        saved = engine.global_steps if args.resume else -1
        evaluated = self._last_evaluation()
        while engine.global_steps < args.max_steps and not engine.should_stop:
            engine.train_batch(batches)
            step = engine.global_steps
            if step % (engine.steps_per_print() or args.max_steps) == 0:
                own = {
                    segment: round(float(loss), 4)
                    for segment, loss in engine.segment_losses.items()
                }
                LOG.info("step %d, loss of segments %s", step, own)
            if step == self.first_step + 1:
                self.started = time.perf_counter()  # the first step pays for warm-up
            if args.eval_every and step % args.eval_every == 0 and not engine.should_stop:
                evaluated = self._evaluate()
            if args.save_every and step % args.save_every == 0 and self._saves(step):
                saved = step
        if saved != engine.global_steps:
            self._save()
        if evaluated != engine.global_steps and not engine.should_stop:
            self._evaluate()
        self.bar.close()
        if args.profile and not engine.should_stop:
            profiling.write(engine, None if batches is None else next(batches), self.run_folder)
        if self.is_first:
            self._conclude()

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def _on_report(self, reports: list[SegmentReport]) -> None:
        """Called on rank 0 with all segments' figures of a step."""
        step = reports[0].step
        seconds = self._seconds()
        self.recent.append(
            [
                {
                    "step": step,
                    "segment": r.segment,
                    "stage": r.stage,
                    "split": "train",
                    "loss": r.loss,
                    "has_loss": r.loss is not None,
                    "tokens": step * self.tokens_per_step,
                    "seconds": round(seconds, 3),
                    "nonfinite": r.nonfinite,
                    "nonfinite_step": r.nonfinite_step,
                    "skipped": r.skipped,
                    "grad_norm": r.grad_norm,
                    "lr": r.lr,
                    "idle_share": round(r.idle_share, 4),
                    "step_seconds": round(r.seconds, 4),
                    "sent_bytes": r.sent_bytes,
                    "exchanged_bytes": r.exchanged_bytes,
                    "slowest_link": r.slowest_link,
                }
                for r in reports
            ]
        )
        self._write(self.recent[-1])
        speed = tokens_per_second([row for rows in self.recent for row in rows])
        losses = " ".join(f"{r.loss:.3f}" if r.loss is not None else "-" for r in reports)
        most = max(reports, key=lambda r: r.idle_share)
        idle = sum(r.idle_share for r in reports) / len(reports)
        waits = f"idle {idle:.0%}, most on stage {most.stage} {most.idle_share:.0%}"
        waits += f" for the {most.slowest_link}" if most.slowest_link else ""
        events = [
            f"{r.nonfinite} of segment {r.segment} at step {r.nonfinite_step}, {r.skipped} skipped"
            for r in reports
            if r.nonfinite
        ]
        waits += f" | not finite: {'; '.join(events)}" if events else ""
        self.bar.set_postfix_str(
            f"loss {losses} | {speed:,.0f} tokens/s | {waits}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)

    def note_last_event(self) -> None:
        """What ended the run goes into metrics.jsonl too; its figures could not travel any more."""
        event = self.engine.last_event if self.is_first else None
        if event is not None:
            tokens = event["step"] * self.tokens_per_step
            seconds = round(self._seconds(), 3)
            fixed = {"split": "event", "loss": None, "tokens": tokens, "seconds": seconds}
            self.metrics.write([event | fixed])

    def _evaluate(self) -> int:
        batches = validation_batches(self.data, self.shape, self.args.eval_sequences)
        began = time.perf_counter()
        self.engine.eval_batch(iter(batches), num_micro_batches=len(batches))
        if self.engine.should_stop:  # not all of it has been seen
            return -1
        probed = (
            diagnostics.probe(self.engine, batches[0]) if self.engine.section.diagnostics else {}
        )
        self.started += time.perf_counter() - began  # throughput is that of training
        step = self.engine.global_steps
        if self.is_first:
            bad = [s for s, loss in self.engine.eval_losses.items() if not math.isfinite(loss)]
            if bad:
                _tell(f"step {step}: the validation loss of segments {bad} is not finite")
            per_stage = self.engine.section.segments_per_stage
            found: dict[str, Any] = {
                "validation": {
                    segment: {"loss": loss} for segment, loss in self.engine.eval_losses.items()
                }
            }
            found["diagnostics"] = {
                segment: {"loss": None, **figures} for segment, figures in probed.items()
            }
            self._write(
                [
                    {
                        "step": step,
                        "segment": segment,
                        "stage": segment // per_stage,
                        "split": split,
                        "tokens": step * self.tokens_per_step,
                        "seconds": round(self._seconds(), 3),
                        **figures,
                    }
                    for split, segments in found.items()
                    for segment, figures in segments.items()
                ]
            )
        return step

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to metrics.jsonl, or keep them until there is room."""
        if self.lock.is_lost:
            self.lock.check()
        error = self.metrics.write(rows)
        problem = "" if error is None else reason(error, self.run_folder)
        if problem and problem != self.metrics_problem:
            say(f"cannot write {self.metrics.path}: {problem}; its rows wait until it can be")
        self.metrics_problem = problem

    def _last_evaluation(self) -> int:
        """The step whose validation metrics.jsonl has, when that is this one; else -1. A collective
        call."""
        step = self.engine.global_steps
        found = self.is_first and any(
            row["step"] == step and row.get("split") == "validation" for row in self.metrics.read()
        )
        with self.engine.meeting("the start of the run"):
            return step if gather(found)[0] else -1

    def _saves(self, step: int) -> bool:
        """Save; where the disk does not take it, training goes on."""
        try:
            self._save()
        except SaveError as error:
            LOG.error("%s", error)
            if self.is_first:
                say(f"{error}; training goes on, step {step + self.args.save_every} saves again")
            return False
        return True

    def _save(self) -> None:
        """All rows of metrics.jsonl are on the disk before `latest` names their step."""
        began = time.perf_counter()
        try:
            with self.engine.meeting(f"the save after step {self.engine.global_steps}"):
                self.engine.reports.flush()
                together(self._settle)
            self.engine.save_checkpoint(str(self.run_folder / "checkpoints"))
        finally:
            self.started += time.perf_counter() - began

    def _settle(self) -> None:
        if not self.is_first:
            return
        self.lock.check()
        try:
            self.metrics.sync()
        except OSError as error:
            why = reason(error, self.run_folder)
            raise SaveError(f"cannot write {self.metrics.path}: {why}") from error

    def _conclude(self) -> None:
        picture = self.run_folder / "loss.png"
        draw_losses(self.metrics.path, picture)
        if self.engine.section.diagnostics:
            draw_diagnostics(self.metrics.path, self.run_folder / "diagnostics.png")
        what = "stopped as asked" if self.engine.should_stop else "finished"
        print(summary_table(self.metrics.read()))
        print(
            f"{what} at step {self.engine.global_steps}; loss curves: {picture}; checkpoints: "
            f"{self.run_folder / 'checkpoints'}"
        )
        sys.stdout.flush()


def _tell(sentence: str) -> None:
    """To the console and this rank's log."""
    LOG.warning("%s", sentence)
    say(sentence)


def _say_first(sentence: str) -> None:
    """On the first rank, before and between progress lines."""
    print(sentence, flush=True)


def _say_nothing(sentence: str) -> None:
    """On all others."""


def end_quietly() -> None:
    """Leave together, so that no rank sees a neighbour's connection close while it still works."""
    if dist.is_initialized():
        with meeting("the end of the run"):
            dist.barrier()
        notices.end()
        dist.destroy_process_group()
