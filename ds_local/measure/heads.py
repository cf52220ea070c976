"""What a head of an early segment costs: one forward and backward of each variant, beside one block
of the model and beside a full head."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.config.catalog import Section, head_of
from ds_local.config.sections import HeadConfig
from ds_local.measure.live import LiveTensors
from ds_local.model import blocks, families
from ds_local.model.flops import unit_flops
from ds_local.model.head_times import MEASURED

SEED = 1234
PARTS = [0, 2, 4, 6]  # an embedding, a block | two blocks | a block, a readout

# name -> options of "head", see `catalog.head_of`
VARIANTS: dict[str, Section] = {
    "full": {},
    "full, checkpointed chunks": {"kernel": "checkpointed"},
    **{name: options for name, (options, _) in MEASURED.items()},
}


def gpt2_of(width: int, vocabulary: int, tokens: int, depth: int = 4) -> dict[str, Any]:
    """A config.json without dropout."""
    return {
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": tokens,
        "n_embd": width,
        "n_layer": depth,
        "n_head": max(1, width // 64),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


class _Naive(nn.Module):
    """The loss as one writes it without thinking of memory: all logits at once."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.head.readout(self.head.norm(hidden[:, :-1]))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `benchmark.py heads`: every repetition takes each variant once."""
    config = families.load_model_config(gpt2_of(args.width, args.vocabulary, args.tokens))
    torch.manual_seed(SEED)
    hidden = torch.randn(1, args.tokens, args.width)
    labels = torch.randint(args.vocabulary, (1, args.tokens))
    sections = {
        name: HeadConfig(**head_of(given, args.vocabulary))
        for name, given in VARIANTS.items()
        if given.get("rank", 0) < args.width
    }
    made: dict[str, Callable[[], nn.Module]] = {
        name: partial(blocks.make_head, config, 0, SEED, section, PARTS)
        for name, section in sections.items()
    }
    made = {
        "naive, all logits at once": lambda: _Naive(
            blocks.make_head(config, 0, SEED, HeadConfig(), PARTS)
        )
    } | made
    block = blocks.Block(config, 0, SEED)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    block_seconds: list[float] = []
    facts: dict[str, dict[str, Any]] = {}
    torch.set_num_threads(1)
    load = os.getloadavg()[0]

    def flops_of(section: HeadConfig) -> float:
        return unit_flops(config, section, len(PARTS) - 1, args.tokens).heads[0]

    for repeat in range(args.repeats):
        block_seconds.append(_timed(lambda x: block(x).sum(), hidden)[0])
        for name, make in made.items():
            head = make().train()  # made anew, so that only one is in memory
            taken, live = _timed(partial(loss_of, head, labels=labels), hidden)
            seconds[name].append(taken)
            facts[name] = {
                "live_bytes": live.peak,
                "rss_growth_bytes": live.process_growth,
                "parameters": sum(p.numel() for p in head.parameters() if p.requires_grad),
            }
            print(f"{name}, repetition {repeat + 1}: {taken:.3f} s", file=sys.stderr)
            del head
            gc.collect()
    return [
        {
            "head": name,
            "section": VARIANTS.get(name),
            "of_full_time": median(a / b for a, b in zip(times, seconds["full"], strict=True)),
            "of_full_flops": flops_of(sections.get(name, HeadConfig())) / flops_of(HeadConfig()),
            "seconds": median(times),
            "seconds_lowest": min(times),
            "seconds_highest": max(times),
            "block_seconds": median(block_seconds),
            "width": args.width,
            "vocabulary": args.vocabulary,
            "tokens": args.tokens,
            "load_before": load,
            **facts[name],
        }
        for name, times in seconds.items()
    ]


def loss_of(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The head's loss; what its companion foresees is the hidden state itself."""
    foresees = getattr(head, "companion", None) is not None
    return head(hidden, labels, hidden.detach()) if foresees else head(hidden, labels)


def _timed(loss_of: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[float, LiveTensors]:
    """Forward and backward, twice: processor seconds of the second time, and what the first one
    needed (gradients included).

    Processor time of one thread, not wall-clock: others on this machine then cost the figure
    little.
    """
    with LiveTensors(watch_process=True) as live:
        loss_of(hidden.clone().requires_grad_()).backward()
    x = hidden.clone().requires_grad_()
    start = time.process_time()
    loss_of(x).backward()
    return time.process_time() - start, live
