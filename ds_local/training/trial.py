"""A dry run: everything is checked, the ranks meet, two steps run, nothing is written."""

from __future__ import annotations

import time
from argparse import Namespace
from datetime import timedelta

from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.links.agreement import gather
from ds_local.links.device import peak_memory

_VALIDATED = 4  # micro-batches of validation that are timed


def try_out(
    engine: LocalPipelineEngine, data: TokenData, shape: BatchShape, args: Namespace
) -> str:
    """Two steps, of which the first one pays for the start, and some validation. A collective call.

    Args:
        args: of `scripts/train.py`.

    Returns:
        What the whole run would take, in a sentence.
    """
    step, batches = engine.global_steps, None
    if engine.is_first_stage():
        batches = training_batches(data, engine.section.seed, step * shape.per_step, shape)
    engine.ends_after(step + 2)
    engine.train_batch(batches)
    began = time.perf_counter()
    engine.train_batch(batches)
    step_seconds = time.perf_counter() - began
    validation = validation_batches(data, shape, args.eval_sequences)
    count = min(_VALIDATED, len(validation))
    began = time.perf_counter()
    engine.eval_batch((validation[n] for n in range(count)), num_micro_batches=count)
    seconds = (time.perf_counter() - began) / count * len(validation)
    held = peak_memory(engine.device)
    slowest, seconds, memory = _of_all(engine.stage_id, step_seconds, seconds, held)
    left = args.max_steps - step
    validations = 1 + (left // args.eval_every if args.eval_every else 0)
    whole = timedelta(seconds=round(left * slowest + validations * seconds))
    tokens = shape.per_step * data.seq_len / slowest
    each = ", ".join(f"stage {n} {bytes_ / 2**30:.2f} GiB" for n, bytes_ in sorted(memory.items()))
    return (
        f"dry run: a step takes {slowest:.3g} s ({tokens:,.0f} tokens/s), a validation about "
        f"{seconds:.3g} s; {left:,} steps and {validations:,} validations about {whole}; memory "
        f"{each}; nothing was written"
    )


def _of_all(
    stage: int, step_seconds: float, seconds: float, held: int
) -> tuple[float, float, dict[int, int]]:
    """(slowest step, slowest validation, most bytes of each stage) over all ranks."""
    stages, steps, validations, bytes_ = zip(
        *gather((stage, step_seconds, seconds, held)), strict=True
    )
    memory: dict[int, int] = {}
    for one, amount in zip(stages, bytes_, strict=True):
        memory[one] = max(memory.get(one, 0), amount)
    return max(steps), max(validations), memory
