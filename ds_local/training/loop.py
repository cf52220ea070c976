"""The training loop: build, train, evaluate every segment, save, resume, stop when told to.

`scripts/train.py` parses the arguments and calls `train`. A run folder holds run.json (what ran),
metrics.jsonl (what came of it), checkpoints/ and loss.png.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import distributed as dist
from tqdm import tqdm

from ds_local.checkpoints.folder import latest_tag
from ds_local.checkpoints.metrics_file import MetricsFile
from ds_local.cluster import start_check as cluster
from ds_local.config.deepspeed import batch_sizes, check_deepspeed
from ds_local.config.files import load_config, local_parallel
from ds_local.config.placement import num_stages_and_replicas
from ds_local.config.schema import SECTION, Scheme
from ds_local.data.corpus import check_same_tokenizer
from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.initialize import initialize
from ds_local.engine.module import causal_lm
from ds_local.engine.recorder import Recorder
from ds_local.engine.reports import SegmentReport
from ds_local.errors import ConfigError
from ds_local.links.watchdog import LOG, Watchdog, say, start_log
from ds_local.model import blocks
from ds_local.model.flops import auxiliary_shares
from ds_local.model.pretrained import find_weights
from ds_local.schedules.replay import grid_of
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Schedule
from ds_local.training import diagnostics, profiling
from ds_local.training.pictures import draw_diagnostics, draw_losses, summary_table

# arguments that decide when stages meet: they must be the same on every rank
_MEETINGS = (
    "max_steps",
    "eval_every",
    "eval_sequences",
    "save_every",
    "resume",
    "profile",
    "from_scratch",
)
VOCABULARY_PADDING = (
    128  # a model's vocabulary may be rounded up by less than this, as is usual for speed
)


def train(args: Namespace) -> None:
    """Run `scripts/train.py`; see there for the arguments.

    Raises:
        ConfigError, DataError, CheckpointError, ...: in a sentence, before any training, with
        nothing lost.
    """
    check_launcher(os.environ)
    config, data, hf_config = read_inputs(args)
    run = Path(args.output)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    section = local_parallel(config)
    stages, replicas = num_stages_and_replicas(section, world_size)
    micro_batch_size, num_micro_batches = batch_sizes(config, replicas)
    _ = RunPlan.of(section, stages, num_micro_batches).schedules  # refuses what does not fit
    _check_run_folder(run, args.resume)
    if world_size > 1 and "MASTER_ADDR" in os.environ:
        neighbours = section.layout.neighbours(int(os.environ["RANK"]), stages, replicas)
        meetings = {key: value for key, value in vars(args).items() if key in _MEETINGS}
        facts = cluster.own_facts([config, blocks.config_dict(hf_config), meetings], args.data)
        cluster.check_start(facts, neighbours, section.layout.start_timeout_seconds)

    weights = None if args.from_scratch or args.resume else find_weights(args.model)
    model = causal_lm(hf_config, stages, config, data.seq_len, weights=weights)
    engine = initialize(model=model, config=config)[0]
    if args.resume:
        engine.load_checkpoint(str(run / "checkpoints"))
    shape = BatchShape(micro_batch_size, num_micro_batches, replicas, engine.replica_id)
    hosts = cluster.stage_hosts(engine.stage_id)
    if engine.global_rank == 0:
        print(cluster.describe_hosts(hosts), flush=True)
        _start_run_folder(run, args, config, data, engine, hosts)
    dist.barrier()
    start_log(run / "logs", engine.stage_id, engine.global_rank)
    watchdog = Watchdog(
        engine.stage_id,
        engine.global_rank,
        world_size,
        engine._links,
        section.link.warn_seconds,
        say=say,
    )
    try:
        _Loop(args, run, engine, data, shape).run()
    except BaseException as error:
        LOG.error("%s", error)
        raise
    finally:
        watchdog.stop()


def read_inputs(args: Namespace) -> tuple[dict[str, Any], TokenData, Any]:
    """Config, data and model of a run, checked against each other.

    Raises:
        ConfigError: naming the two values that contradict each other.
    """
    config = load_config(args.deepspeed_config)
    check_deepspeed(config)
    config[SECTION] = overridden_section(config.get(SECTION, {}), args)
    local_parallel(config)
    data = TokenData(args.data)
    hf_config = blocks.load_model_config(args.model)
    padding = hf_config.vocab_size - data.vocab_size
    weights = None if args.from_scratch or args.resume else find_weights(args.model)
    same_tokens = weights is not None and check_same_tokenizer(weights, data.tokenizer_folder)
    if padding < 0 or (padding >= VOCABULARY_PADDING and not same_tokens and not args.resume):
        raise ConfigError(
            f"{args.model} has vocab_size {hf_config.vocab_size} but the tokenizer in {args.data} has {data.vocab_size} tokens; "
            f"set vocab_size to {data.vocab_size}, or prepare the data with another tokenizer"
        )
    if data.seq_len > blocks.num_positions(hf_config):
        raise ConfigError(
            f"{args.data} has sequences of {data.seq_len} tokens but {args.model} takes at most "
            f"{blocks.num_positions(hf_config)}; prepare the data with a smaller --seq-len"
        )
    hf_config.bos_token_id = hf_config.eos_token_id = data.facts["eos_token_id"]
    return config, data, hf_config


def overridden_section(section: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """The "local_parallel" section with what the command line says instead."""
    section = dict(section)
    if args.mode is not None or args.backprop_micro_batches is not None:
        for key in (*Scheme.model_fields, "phases", "cycle_steps"):
            section.pop(key, None)
        row = {"mode": args.mode or "local"} | (
            {} if args.window is None else {"window": args.window}
        )
        if args.backprop_micro_batches:
            section["mix"] = [
                {"mode": "backprop", "micro_batches": args.backprop_micro_batches},
                row,
            ]
        else:
            section |= row
        if args.backprop_from is not None:
            scheme = {key: section.pop(key) for key in ("mode", "window", "mix") if key in section}
            section["phases"] = [{**scheme, "until_step": args.backprop_from}, {"mode": "backprop"}]
    elif args.window is not None or args.backprop_from is not None:
        raise ConfigError("--window and --backprop-from need --mode or --backprop-micro-batches")
    for key in ("num_stages", "segments_per_stage", "seed"):
        if getattr(args, key) is not None:
            section[key] = getattr(args, key)
    return section


def check_launcher(environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes N` sets some variables for N processes and starts
    one."""
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    if (
        "ACCELERATE_USE_CPU" in environment
        and "MASTER_ADDR" in environment
        and not any(name in environment for name in names)
    ):
        raise ConfigError(
            "accelerate launch started one process only, as it does with --cpu; replace --cpu by --multi_gpu, which needs no "
            "GPU, or use torchrun or the deepspeed launcher"
        )


def _check_run_folder(run: Path, resume: bool) -> None:
    if resume:
        latest_tag(run / "checkpoints")
    elif (run / "run.json").exists():
        raise ConfigError(
            f"{run} already holds a run; add --resume to continue it, or choose another --output"
        )


def _start_run_folder(
    run: Path,
    args: Namespace,
    config: dict[str, Any],
    data: TokenData,
    engine: LocalPipelineEngine,
    hosts: dict[str, Any],
) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not args.resume:
        shutil.copytree(
            data.tokenizer_folder, run / "checkpoints" / "tokenizer", dirs_exist_ok=True
        )
    schedules = engine.plan.schedules
    facts = {
        "arguments": vars(args),
        "config": config,
        "model": blocks.config_dict(engine.module.hf_config),
        "weights": _name_of_weights(args),
        "data": {"folder": str(data.folder), **data.facts},
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
        "versions": {
            name: version(name)
            for name in ("ds_local", "torch", "deepspeed", "transformers", "datasets")
        }
        | {"python": platform.python_version()},
    }
    (run / "run.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")


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
        run: Path,
        engine: LocalPipelineEngine,
        data: TokenData,
        shape: BatchShape,
    ) -> None:
        self.args, self.run_folder, self.engine, self.data = args, run, engine, data
        self.shape = shape
        self.is_first = engine.global_rank == 0
        self.tokens_per_step = shape.per_step * data.seq_len
        self.metrics = MetricsFile(run / "metrics.jsonl")
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0
        self.first_step = engine.global_steps
        if self.is_first:
            self.earlier_seconds = self.metrics.keep_until(engine.global_steps)
            engine.reports.listeners.append(self._on_report)
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
        signal.signal(signal.SIGTERM, lambda *_: engine.request_stop())
        batches = None
        if engine.is_first_stage():
            batches = training_batches(
                self.data, engine.section.seed, engine.global_steps, self.shape
            )
        if args.profile:
            engine.recorder = Recorder(engine.device)
        saved = evaluated = engine.global_steps if args.resume else -1
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
            if args.eval_every and step % args.eval_every == 0:
                evaluated = self._evaluate()
            if args.save_every and step % args.save_every == 0:
                saved = self._save()
        if saved != engine.global_steps:
            self._save()
        if evaluated != engine.global_steps and not engine.should_stop:
            self._evaluate()
        self.bar.close()
        if args.profile:
            profiling.write(engine, None if batches is None else next(batches), self.run_folder)
        if self.is_first:
            self._conclude()

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def _on_report(self, reports: list[SegmentReport]) -> None:
        """Called on rank 0 with all segments' figures of a step."""
        step = reports[0].step
        seconds = self._seconds()
        self.metrics.write(
            [
                {
                    "step": step,
                    "segment": r.segment,
                    "stage": r.stage,
                    "split": "train",
                    "loss": r.loss,
                    "tokens": step * self.tokens_per_step,
                    "seconds": round(seconds, 3),
                    "grad_norm": r.grad_norm,
                    "idle_share": round(r.idle_share, 4),
                    "step_seconds": round(r.seconds, 4),
                    "sent_bytes": r.sent_bytes,
                    "exchanged_bytes": r.exchanged_bytes,
                    "slowest_link": r.slowest_link,
                }
                for r in reports
            ]
        )
        losses = " ".join(f"{r.loss:.3f}" if r.loss is not None else "-" for r in reports)
        most = max(reports, key=lambda r: r.idle_share)
        idle = sum(r.idle_share for r in reports) / len(reports)
        waits = f"idle {idle:.0%}, most on stage {most.stage} {most.idle_share:.0%}"
        waits += f" for the {most.slowest_link}" if most.slowest_link else ""
        self.bar.set_postfix_str(
            f"loss {losses} | {self._tokens_per_second(step):,.0f} tokens/s | {waits}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)

    def _tokens_per_second(self, step: int) -> float:
        elapsed = time.perf_counter() - self.started
        return (
            max(0, step - self.first_step - 1) * self.tokens_per_step / elapsed
            if elapsed > 0
            else 0.0
        )

    def _evaluate(self) -> int:
        batches = validation_batches(self.data, self.shape, self.args.eval_sequences)
        began = time.perf_counter()
        self.engine.eval_batch(iter(batches), num_micro_batches=len(batches))
        probed = (
            diagnostics.probe(self.engine, batches[0]) if self.engine.section.diagnostics else {}
        )
        self.started += time.perf_counter() - began  # throughput is that of training
        step = self.engine.global_steps
        if self.is_first:
            per_stage = self.engine.section.segments_per_stage
            found: dict[str, Any] = {
                "validation": {
                    segment: {"loss": loss} for segment, loss in self.engine.eval_losses.items()
                }
            }
            found["diagnostics"] = {
                segment: {"loss": None, **figures} for segment, figures in probed.items()
            }
            self.metrics.write(
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

    def _save(self) -> int:
        began = time.perf_counter()
        self.engine.save_checkpoint(str(self.run_folder / "checkpoints"))
        self.started += time.perf_counter() - began
        return self.engine.global_steps

    def _conclude(self) -> None:
        picture = self.run_folder / "loss.png"
        draw_losses(self.metrics.path, picture)
        if self.engine.section.diagnostics:
            draw_diagnostics(self.metrics.path, self.run_folder / "diagnostics.png")
        what = "stopped as asked" if self.engine.should_stop else "finished"
        print(summary_table(self.metrics.read()))
        print(
            f"{what} at step {self.engine.global_steps}; loss curves: {picture}; checkpoints: {self.run_folder / 'checkpoints'}"
        )
        sys.stdout.flush()


def running() -> bool:
    """Have the processes met? Before that all of them find the same mistakes."""
    return dist.is_initialized()


def end_quietly() -> None:
    """Leave together, so that no rank sees a neighbour's connection close while it still works."""
    if running():
        dist.barrier()
        dist.destroy_process_group()
