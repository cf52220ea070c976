"""What the model writes while it trains: it continues the beginning of a validation sequence.

A token at a time, the whole sequence through all stages each time: slow, but it needs nothing that
an evaluation does not have. The last stage draws the next token, all others are told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ds_local.data.dataset import TokenData, micro_batch_of
from ds_local.data.tokenizers import load_tokenizer
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.model.seeds import seed_for

TEMPERATURE, TOP_K = 0.8, 50


def sample(
    engine: LocalPipelineEngine, data: TokenData, inputs: Any, tokens: int
) -> dict[int, dict[str, Any]]:
    """Continue the first quarter of a validation sequence. A collective call.

    Args:
        inputs: of a micro-batch of validation.
        tokens: to add; 0: no sample.

    Returns:
        On rank 0 the figures of a row of metrics.jsonl, by segment; nothing elsewhere.
    """
    if not tokens:
        return {}
    length = max(1, data.seq_len // 4)
    ids_BT = inputs["input_ids"] if isinstance(inputs, dict) else inputs
    ids = continued(engine, ids_BT, length, tokens, lambda ids: micro_batch_of(data, ids, ids))
    if engine.global_rank:
        return {}
    tokenizer = load_tokenizer(data.tokenizer_folder)
    prompt, whole = (tokenizer.decode(part) for part in (ids[:length], ids))
    text = whole.removeprefix(prompt)
    return {engine.num_segments - 1: {"loss": None, "prompt": prompt, "text": text}}


def sample_line(step: int, row: dict[str, Any]) -> str:
    """For the console."""
    prompt, text = (" ".join(row[part].split()) for part in ("prompt", "text"))
    return f"step {step}: ...{prompt[-40:]} >> {text[:80]}"


def continued(
    engine: LocalPipelineEngine,
    ids_BT: Tensor,
    length: int,
    tokens: int,
    batch_of: Callable[[Tensor], Any] = lambda ids: (ids, ids),
) -> Tensor:
    """Continue the first sequence of a micro-batch. A collective call; the same on all ranks of a
    replica.

    The draw depends on the run's seed and the step alone.

    Args:
        ids_BT: token ids (int64) of the shape that evaluation has; its first sequence begins with
            the prompt, what follows is not looked at.
        length: of the prompt.
        tokens: to add, as far as the sequence has room.
        batch_of: makes a micro-batch of the ids.

    Returns:
        Ids of prompt and continuation, on the CPU.
    """
    ids = ids_BT.clone()
    end = min(length + tokens, ids.shape[1])
    seed = seed_for(engine.section.seed, "sample", engine.global_steps)
    generator = torch.Generator().manual_seed(seed)
    kept = engine.eval_losses
    speaks = engine.num_segments - 1 in engine.module.local_segments and engine.replica_id == 0
    for position in range(length, end):
        _, logits = engine.eval_batch(
            iter([batch_of(ids)]), return_logits=True, compute_loss=False, num_micro_batches=1
        )
        found = torch.zeros(1, dtype=torch.int64, device=engine.device)
        if speaks and logits is not None:
            found += _drawn(logits[0, position - 1], generator)
        with engine.meeting("the drawing of a sample"):
            dist.all_reduce(found)
        ids[0, position] = found.item()
    engine.eval_losses = kept
    return ids[0, :end].cpu()


def _drawn(logits_V: Tensor, generator: torch.Generator) -> int:
    likeliest = logits_V.float().cpu().topk(min(TOP_K, len(logits_V)))
    if not likeliest.values.isfinite().all():
        return int(likeliest.indices[0])
    shares = (likeliest.values / TEMPERATURE).softmax(0)
    return int(likeliest.indices[torch.multinomial(shares, 1, generator=generator)])
