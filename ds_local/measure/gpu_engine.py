"""The engine on one device, in one process, beside a plain training loop: what it costs the host,
and what heads cost the device."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch

from ds_local.measure.device import Device

SEGMENTS = 4
SYSTEMS: dict[str, dict[str, Any]] = {
    "backprop": {"mode": "backprop"},
    "local": {"mode": "local", "head": {"readout": "shared", "token_fraction": 0.125}},
    "chunked 2": {"mode": "chunked", "head": {"readout": "shared", "token_fraction": 0.125}},
    "chunked 2, split": {
        "mode": "chunked",
        "split_backward": 1,
        "head": {"readout": "shared", "token_fraction": 0.125},
    },
}


def engine_rows(
    device: Device, source: dict[str, Any], model: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Tokens a second of whole steps, by the host's clock over several of them.

    Args:
        source: the model's config.json.
        model: its name in the rows.
    """
    rows = []
    for name, section in SYSTEMS.items():
        eager = args.no_compile or "split_backward" in section  # compiled, nothing can be deferred
        for compiled in [False] if eager else [False, True]:
            head = {"kernel": args.kernel, **section.get("head", {})}
            whole_section = section | {"compile": compiled, "head": head}
            rows.append(_measured(device, source, whole_section, args))
            rows[-1] |= {"what": "engine", "model": model, "schedule": name, "compiled": compiled}
    return rows


def _measured(
    device: Device, source: dict[str, Any], section: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    import ds_local
    from ds_local.engine.process_group import end_processes

    device.forget_peak()
    config = {
        "train_micro_batch_size_per_gpu": args.sequences,
        "gradient_accumulation_steps": args.accumulate,
        "steps_per_print": 1000,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "local_parallel": {"segments_per_stage": SEGMENTS, **section},
    }
    torch.manual_seed(0)
    vocabulary = source["vocab_size"]
    batches = [torch.randint(vocabulary, (args.sequences, args.tokens)) for _ in range(8)]
    try:
        module = ds_local.causal_lm(source, num_stages=1, config=config, seq_len=args.tokens)
        engine = ds_local.initialize(model=module, config=config)[0]
        data = iter(lambda: batches[engine.global_steps % len(batches)], None)
        for _ in range(3):
            engine.train_batch(data)
        times = []
        for _ in range(3):  # a step's time is even only over several
            began = time.perf_counter()
            for _ in range(args.repeats):
                engine.train_batch(data)
            if device.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / args.repeats)
        peak = device.peak()
    finally:
        end_processes()
    tokens = args.sequences * args.tokens * args.accumulate
    return {
        "micro_batches": args.accumulate,
        "tokens_per_second": tokens / median(times),
        "step_seconds": median(times),
        "segments": SEGMENTS,
        "peak_bytes": peak,
        "sequences": args.sequences,
        "tokens": args.tokens,
    }
