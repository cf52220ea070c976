"""Real compute on two ranks, each pinned to a core of its own: a GPT-2-shaped model in every
system, tokens/s and time to a loss.

All systems train the same model from the same weights on the same sequences in the same order with
the same optimizer; stages are balanced for every system (readout and heads counted), and plain data
parallelism runs beside them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ds_local.data.dataset import TokenData
from ds_local.errors import ConfigError
from ds_local.measure.heads import gpt2_of
from ds_local.measure.ranks import Pool
from ds_local.measure.real_systems import RANKS, SEED, SYSTEMS, Job

WARM_STEPS = 3
EVAL_EVERY = 10


# --- on a rank ------------------------------------------------------------------------------------


@contextmanager
def pinned() -> Iterator[None]:
    """Inside, this rank has a core of its own."""
    from torch import distributed as dist

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _pinned(
    system: tuple[str, str], job: Job, work: Callable[[Callable[[], Any], Callable[[], float]], Any]
) -> Any:
    with pinned():
        torch.manual_seed(SEED)
        return work(*SYSTEMS[system][1](job))


def speed(system: tuple[str, str], job: Job, steps: int) -> float:
    """Seconds a step takes on this rank."""

    def work(step: Callable[[], Any], evaluate: Callable[[], float]) -> float:
        for _ in range(WARM_STEPS):
            step()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) / steps

    return _pinned(system, job, work)


def until_loss(
    system: tuple[str, str], job: Job, target: float, max_steps: int
) -> list[tuple[int, float, float]]:
    """(step, seconds of training so far, validation loss), until the loss is reached or the steps
    are used up."""
    from torch import distributed as dist

    def work(
        step: Callable[[], Any], evaluate: Callable[[], float]
    ) -> list[tuple[int, float, float]]:
        seconds, curve = 0.0, []
        for done in range(EVAL_EVERY, max_steps + 1, EVAL_EVERY):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(EVAL_EVERY):
                step()
            dist.barrier()
            seconds += time.perf_counter() - start
            curve.append((done, seconds, evaluate()))
            if curve[-1][2] <= target:
                break
        return curve

    return _pinned(system, job, work)


# --- the command ----------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `benchmark.py real`.

    Raises:
        ConfigError: for arguments that contradict each other.
    """
    if args.target_loss is not None and args.data is None:
        raise ConfigError("--target-loss needs --data DIR, a folder of scripts/prepare_data.py")
    systems = [
        key
        for key in SYSTEMS
        if not args.systems or any(name in ":".join(key) for name in args.systems)
    ]
    pool = Pool()
    try:
        rows = [
            row
            for m in args.micro_batches
            for row in _speed_rows(args, systems, _job(args, m), pool)
        ]
        if args.target_loss is not None:
            job = _job(args, max(args.micro_batches, default=4))
            rows += [_loss_row(args, system, job, pool) for system in systems]
        return rows
    finally:
        pool.close()


def _job(args: argparse.Namespace, micro_batches: int) -> Job:
    tokens, vocabulary = 128, 4096
    if args.data is not None:
        data = TokenData(args.data)
        tokens, vocabulary = data.seq_len, data.vocab_size
    return Job(
        gpt2_of(args.width, vocabulary, tokens, args.blocks),
        None if args.data is None else str(Path(args.data).resolve()),
        tokens,
        args.sequences,
        micro_batches,
    )


def _speed_rows(
    args: argparse.Namespace, systems: list[tuple[str, str]], job: Job, pool: Pool
) -> list[dict[str, Any]]:
    able = [system for system in systems if job.micro_batches >= SYSTEMS[system][0]]
    periods: dict[tuple[str, str], list[float]] = {system: [] for system in able}
    load = os.getloadavg()[0]
    for repeat in range(args.repeats):
        for system in able:
            periods[system].append(
                max(pool.run(speed, RANKS, system, job, args.steps, timeout=3600))
            )
            print(
                f"M={job.micro_batches} {':'.join(system)}, repetition {repeat + 1}: "
                f"{periods[system][-1]:.3f} s a step",
                file=sys.stderr,
            )
    tokens = job.tokens * job.sequences * job.micro_batches
    return [
        _facts(job, system)
        | {
            "what": "speed",
            "step_seconds": median(times),
            "repetitions": times,
            "load_before": load,
            "tokens_per_second": tokens / median(times),
            "tokens_per_second_lowest": tokens / max(times),
            "tokens_per_second_highest": tokens / min(times),
        }
        for system, times in periods.items()
    ]


def _loss_row(
    args: argparse.Namespace, system: tuple[str, str], job: Job, pool: Pool
) -> dict[str, Any]:
    load = os.getloadavg()[0]
    curve = pool.run(
        until_loss, RANKS, system, job, args.target_loss, args.max_steps, timeout=24 * 3600
    )[0]
    steps, seconds = reached(curve, args.target_loss) or (None, None)
    print(
        f"{':'.join(system)}: loss {curve[-1][2]:.3f} after {curve[-1][0]} steps and "
        f"{curve[-1][1]:.0f} s",
        file=sys.stderr,
    )
    return _facts(job, system) | {
        "what": "time to loss",
        "target_loss": args.target_loss,
        "seconds": seconds,
        "steps": steps,
        "last_loss": curve[-1][2],
        "curve": curve,
        "load_before": load,
    }


def reached(curve: list[tuple[int, float, float]], target: float) -> tuple[float, float] | None:
    """(steps, seconds) at which a curve of (step, seconds, loss) is down at the target, between its
    two looks at the loss."""
    if curve[-1][2] > target:
        return None
    if len(curve) == 1:
        return curve[0][:2]
    (step, seconds, high), (later_step, later_seconds, low) = curve[-2:]
    share = (high - target) / (high - low)
    return step + share * (later_step - step), seconds + share * (later_seconds - seconds)


def _facts(job: Job, system: tuple[str, str]) -> dict[str, Any]:
    return {
        "system": system[0],
        "schedule": system[1],
        "stages": RANKS,
        "micro_batches": job.micro_batches,
        "link": None,
        "model": job.model,
        "sequences": job.sequences,
        "tokens": job.tokens,
    }
