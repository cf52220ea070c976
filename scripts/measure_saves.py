"""How long a save keeps a run from training: one that waits beside an asynchronous one.

    python scripts/measure_saves.py --output docs/results/saves.json

A GPT-2 of 2 stages with about 100 MB of weights each, so about 300 MB a stage with Adam's moments,
on two ranks of this machine. Files go to the folder for temporary files (TMPDIR).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 512,
    "n_head": 8,
    "vocab_size": 8192,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SAVES, STEPS_BETWEEN = 5, 6


def saves(folder: str, beside: bool) -> dict[str, Any]:
    """On one rank: seconds of each save, of steps without one under way and of steps with one."""
    import torch

    import ds_local

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "local_parallel": {"mode": "local", "async_save": beside},
    }
    module = ds_local.causal_lm(MODEL, num_stages=2, config=config, seq_len=64)
    engine = ds_local.initialize(model=module, config=config)[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, MODEL["vocab_size"], (2, 64), generator=generator)

    def step() -> float:
        began = time.perf_counter()
        engine.train_batch(iter([(ids, ids)] * 2))
        return time.perf_counter() - began

    step()
    quiet, paused, whole, meanwhile = [], [], [], []
    for _ in range(SAVES):
        quiet += [step() for _ in range(STEPS_BETWEEN)]
        began = time.perf_counter()
        engine.save_checkpoint(folder)
        paused.append(time.perf_counter() - began)
        meanwhile += [step() for _ in range(STEPS_BETWEEN)]
        began_waiting = time.perf_counter()
        engine.wait_for_save()
        whole.append(time.perf_counter() - began_waiting)
    weights = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    return {
        "weights_mb": round(weights / 1e6, 1),
        "pause_seconds": [round(t, 3) for t in paused],
        "wait_at_the_end_seconds": [round(t, 3) for t in whole],
        "step_seconds": round(statistics.median(quiet), 3),
        "step_seconds_after_a_save": round(statistics.median(meanwhile), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; default: the console")
    args = parser.parse_args()
    from ds_local.measure.ranks import Pool

    pool = Pool()
    found: dict[str, Any] = {}
    for name, beside in (("waits", False), ("asynchronous", True)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = pool.run(saves, 2, folder, beside, timeout=900)
            (latest,) = Path(folder).glob(Path(folder, "latest").read_text())
            size = sum(path.stat().st_size for path in latest.iterdir())
            found[f"{name}_checkpoint_mb"] = round(size / 1e6, 1)
    pool.close()
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }
    text = json.dumps({**about, **found}, indent=1)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
