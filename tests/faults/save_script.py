"""A script of a user who saves by himself: what the campaign of kills within a save runs on every
rank.

    save_script.py save FOLDER MODEL CONFIG first|other|again      dies in its last save, if a hook says so
    save_script.py load FOLDER MODEL CONFIG first|other|again      prints what it found, then saves once more

first: nothing has been saved before. other: a save under another tag. again: a save under the same
tag. Each save prints the step with a digest of weights and optimizer.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from typing import Any

import torch

import ds_local

TAG = "best"


def digest(engine: Any) -> str:
    """Of everything on this rank that training changes."""
    found = hashlib.sha256()
    states = [
        engine.module.state_dict(),
        engine.basic_optimizer.state_dict(),
        engine.lr_scheduler.state_dict(),
    ]
    for _, tensor in sorted(leaves(states)):
        found.update(tensor)
    return found.hexdigest()[:16]


def leaves(content: Any, name: str = "") -> list[tuple[str, bytes]]:
    if isinstance(content, torch.Tensor):
        return [(name, content.detach().float().numpy().tobytes())]
    if isinstance(content, dict):
        content = list(content.items())
    if isinstance(content, list | tuple):
        return [
            leaf for number, one in enumerate(content) for leaf in leaves(one, f"{name}.{number}")
        ]
    return [(name, repr(content).encode())]


def main() -> None:
    what, folder, model_config, config, kind = sys.argv[1:]
    model = ds_local.causal_lm(model_config, num_stages=2, config=config, seq_len=16)
    engine, *_ = ds_local.initialize(model=model, config=config)
    tag = TAG if kind == "again" else None

    def train() -> None:
        ids = torch.randint(
            0, 64, (2, 16), generator=torch.Generator().manual_seed(engine.global_steps)
        )
        engine.train_batch(itertools.repeat((ids, ids)))

    def save() -> None:
        engine.save_checkpoint(folder, tag=tag)
        print(f"SAVED {engine.global_steps} {digest(engine)}", flush=True)

    if what == "save":
        if kind != "first":
            train()
            save()
        train()
        if "hooks" in sys.modules:
            sys.modules["hooks"].arm()
        save()
    else:
        try:
            engine.load_checkpoint(folder, tag=tag)
            print(f"FOUND {engine.global_steps} {digest(engine)}", flush=True)
        except ds_local.DsLocalError as error:
            print(f"REFUSED {error}", flush=True)
        train()
        save()
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
