"""Real compute on two ranks, each pinned to a core of its own: a GPT-2-shaped model in every
system, tokens/s and time to a loss.

All systems train the same model from the same weights on the same sequences in the same order with
the same optimizer; stages are balanced for every system (readout and heads counted), and plain data
parallelism runs beside them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.config.files import local_parallel
from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.errors import ConfigError
from ds_local.measure.ranks import Pool
from ds_local.model.flops import choose_parts

RANKS = 2
SEED = 1234
WARM_STEPS = 3
EVAL_EVERY = 10
EVAL_SEQUENCES = 64
CHEAP_HEAD = {"token_fraction": 0.125}  # a loss for one position in eight


@dataclass(frozen=True)
class Job:
    """What every system is given."""

    model: dict[str, Any]
    data: str | None  # a prepared folder; None: random tokens
    tokens: int  # in a sequence
    sequences: int  # in a micro-batch
    micro_batches: int

    def batches(
        self, sequences: int, micro_batches: int, replicas: int = 1, replica: int = 0
    ) -> Iterator[Any]:
        """Micro-batches (ids, labels) for ever."""
        shape = BatchShape(sequences, micro_batches, replicas, replica)
        if self.data is not None:
            return training_batches(TokenData(self.data), SEED, 0, shape)
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(self.model["vocab_size"], (sequences, self.tokens), generator=generator)
        return itertools.repeat((ids, ids))

    def validation(self) -> Sequence[Any]:
        if self.data is None:
            return [next(self.batches(self.sequences, 1))]
        return validation_batches(
            TokenData(self.data), BatchShape(self.sequences, 1, 1, 0), EVAL_SEQUENCES
        )


Built = tuple[Callable[[], Any], Callable[[], float]]  # take a step; validation loss


def ds_local(job: Job, scheme: dict[str, Any]) -> Built:
    import ds_local as package

    config = config_of(job) | {"local_parallel": scheme}
    module = package.causal_lm(job.model, RANKS, config, job.tokens)
    engine = package.initialize(model=module, config=config)[0]
    data = job.batches(job.sequences, job.micro_batches)

    def evaluate() -> float:
        batches = job.validation()
        return engine.eval_batch(iter(batches), num_micro_batches=len(batches)).item()

    return lambda: engine.train_batch(data), evaluate


def deepspeed(job: Job) -> Built:
    """DeepSpeed's PipelineEngine on the same layers, cut where all stages carry the same work."""
    import deepspeed as package
    from deepspeed.pipe import PipelineModule

    from ds_local.model import families, heads

    hf_config = families.load_model_config(job.model)
    section = local_parallel({"local_parallel": {"mode": "backprop"}})
    parts = choose_parts(hf_config, section, RANKS, job.micro_batches, job.tokens)

    class Balanced(PipelineModule):
        def _partition_layers(self, method: str = "uniform") -> None:
            self.parts = parts
            self._set_bounds(parts[self.stage_id], parts[self.stage_id + 1])

    module = Balanced(_layers(job.model), num_stages=RANKS, loss_fn=heads.lm_loss)
    engine = package.initialize(model=module, config=config_of(job))[0]
    data = job.batches(job.sequences, job.micro_batches)

    def evaluate() -> float:
        batches = job.validation()
        return engine.eval_batch(iter(batches), num_micro_batches=len(batches)).item()

    return lambda: engine.train_batch(data), evaluate


class _Whole(nn.Module):
    """The model in one piece: (ids, labels) -> loss."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layers(model))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in itertools.islice(self.layers, len(self.layers) - 1):
            x = layer(x)
        return self.layers[-1].loss(x, labels)  # type: ignore[operator]


def data_parallel(job: Job) -> Built:
    """The whole model on each rank, gradients averaged by torch's DistributedDataParallel: the same
    sequences a step."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    whole = _Whole(job.model)
    replica = DistributedDataParallel(whole)
    optimizer = torch.optim.AdamW(whole.parameters(), **OPTIMIZER)
    # a step's sequences are dealt to the replicas; a single micro-batch is halved
    halves = job.micro_batches == 1
    micro_batches = 1 if halves else job.micro_batches // RANKS
    sequences = job.sequences // RANKS if halves else job.sequences
    data = job.batches(sequences, micro_batches, RANKS, dist.get_rank())

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(micro_batches - 1):
            with replica.no_sync():
                (replica(*next(data)) / micro_batches).backward()
        (replica(*next(data)) / micro_batches).backward()
        optimizer.step()

    def evaluate() -> float:
        with torch.no_grad():
            losses = [whole(*batch).item() for batch in job.validation()]
        return sum(losses) / len(losses)

    return step, evaluate


OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def config_of(job: Job) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": job.sequences,
        "gradient_accumulation_steps": job.micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "AdamW", "params": OPTIMIZER | {"torch_adam": True}},
    }


def _layers(model: dict[str, Any]) -> list[nn.Module]:
    from ds_local.model import blocks, families

    config = families.load_model_config(model)
    middle = [blocks.Block(config, index, SEED) for index in range(families.num_blocks(config))]
    return [blocks.Embedding(config, SEED), *middle, blocks.Readout(config, SEED)]


def _mixed(micro_batches: int) -> dict[str, Any]:
    true = {"mode": "backprop", "micro_batches": max(1, micro_batches // 4)}
    return {"mix": [true, {"mode": "local"}], "head": CHEAP_HEAD}


# (owner, name) -> fewest micro-batches, builder
SYSTEMS: dict[tuple[str, str], tuple[int, Callable[[Job], Built]]] = {
    ("ds_local", "local"): (1, lambda job: ds_local(job, {"mode": "local", "head": CHEAP_HEAD})),
    ("ds_local", "mixed 1/4"): (4, lambda job: ds_local(job, _mixed(job.micro_batches))),
    ("ds_local", "backprop"): (1, lambda job: ds_local(job, {"mode": "backprop"})),
    ("ds_local", "backprop, split 2"): (
        1,
        lambda job: ds_local(job, {"mode": "backprop", "split_backward": 2}),
    ),
    ("deepspeed", "1F1B"): (1, deepspeed),
    ("torch", "data parallel"): (1, data_parallel),
}


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
    model = {
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": tokens,
        "n_embd": args.width,
        "n_layer": args.blocks,
        "n_head": max(1, args.width // 64),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return Job(
        model,
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
