"""A dry run: everything is checked, the ranks meet, two steps run, nothing is written."""

from __future__ import annotations

import time
from argparse import Namespace
from datetime import timedelta

from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.links.agreement import gather
from ds_local.training.profiling import most_held

_VALIDATED = 4  # micro-batches of validation that are timed


def dry_run(
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
    slowest, seconds = map(max, zip(*gather((step_seconds, seconds)), strict=True))
    memory = most_held(engine)
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
