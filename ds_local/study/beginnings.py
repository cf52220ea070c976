"""What a run begins with: the checkpoint of another run that is the same until then."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_local.checkpoints.facts import FACTS
from ds_local.checkpoints.metrics_file import METRICS_FILE
from ds_local.checkpoints.run_file import RUN_FILE
from ds_local.outputs.checkpoint_names import HEAD_FILE, LAYER_FILE, STAGE_FILE, step_of, tag_of
from ds_local.study.methods import COSINE, DECAY, METHODS, switch_step
from ds_local.study.runs import Run

_STAGE = STAGE_FILE.format(0)


def leave_trunk(run: Run, place: Path) -> None:
    """Begin from the checkpoint of a run that is the same until then, where there is one."""
    found = shared(run, place.parent)
    if found is None:
        return
    trunk, tag = found
    partial = place / "run.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for part in (tag, "tokenizer"):
        shutil.copytree(trunk / "checkpoints" / part, partial / "checkpoints" / part)
    for part in (RUN_FILE, METRICS_FILE):
        shutil.copy(trunk / part, partial / part)
    (partial / "checkpoints" / "latest").write_text(tag)
    if METHODS[run.method].renew:
        renew_above(partial / "checkpoints" / tag, 1, METHODS[run.method].renew, run.seed)
    partial.rename(place / "run")


def shared(run: Run, folder: Path) -> tuple[Path, str] | None:
    """(run folder, tag) of the checkpoint to begin with.

    Under a cosine that is the finished run without a tail, where the tail begins. WSD runs of any
    length are the same until one of them decays, finished or not; but where losses are dropped by a
    share of the steps, lengths differ from the beginning.
    """
    method, trunk = METHODS[run.method], run.trunk or run
    if method.dropped_by:
        return None
    if method.schedule == COSINE:
        place, tag = folder / trunk.name, tag_of(run.switch(method.tail))
        there = method.tail and (place / "run" / "checkpoints" / tag).exists()
        return (place / "run", tag) if there and (place / "result.json").exists() else None
    differs, base = run.switch(method.tail or DECAY), trunk._replace(step_factor=1.0).name
    found = [(-1, folder)]
    for place in folder.glob(f"{base}*"):
        other_length = place.name == base or place.name.startswith(f"{base}-steps")
        if other_length and (place / "run").exists():
            config = json.loads((place / "ds_config.json").read_text())
            steps = config["scheduler"]["params"]["total_num_steps"]
            last = min(differs, switch_step(steps, DECAY))
            for facts in (place / "run" / "checkpoints").glob(f"*/{FACTS}"):
                at = step_of(facts.parent.name)
                found += [(at, place / "run")] if at is not None and at <= last else []
    step, best = max(found)
    if step < 0 or (method.renew and step < differs):
        return None
    return best, tag_of(step)


def renew_above(checkpoint: Path, segment: int, how: str, seed: int) -> None:
    """Make a checkpoint one in which only the segments up to `segment` have learnt anything.

    Their head becomes the model's readout. The blocks above are "fresh", drawn as GPT-2's are, or
    "copied" from those below, the first on the first. What is replaced has no moments.
    """
    facts = json.loads((checkpoint / FACTS).read_text())
    top, boundary = facts["segment_parts"][-1] - 1, facts["segment_parts"][segment + 1]
    layers = [LAYER_FILE.format(layer) for layer in range(top + 1)]
    generator = torch.Generator().manual_seed(seed)
    states = {name: _load(checkpoint / name) for name in layers}
    for layer in range(boundary, top):
        below = states[layers[1 + (layer - boundary) % (boundary - 1)]]
        for name, old in states[layers[layer]].items():
            drawn = how == "fresh"
            old.copy_(_fresh(name, old, facts["model"], generator) if drawn else below[name])
    head = _load(checkpoint / HEAD_FILE.format(segment))
    for name, old in states[layers[top]].items():
        old.copy_(head[name])
    for name in layers[boundary:]:
        torch.save(states[name], checkpoint / name)
    counts = [len(states[name]) for name in layers]
    whole = _load(checkpoint / _STAGE)
    for parameter in range(sum(counts[:boundary]), sum(counts)):
        for moment in ("exp_avg", "exp_avg_sq"):
            whole["optimizer"]["state"][parameter][moment].zero_()
    torch.save(whole, checkpoint / _STAGE)
    for name in [*layers[boundary:], _STAGE]:
        content = (checkpoint / name).read_bytes()
        facts["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (checkpoint / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def _fresh(name: str, old: Tensor, model: dict[str, Any], generator: torch.Generator) -> Tensor:
    if old.ndim == 1:
        return torch.full_like(old, float(name.endswith("weight")))  # norms and biases
    narrower = math.sqrt(2 * model["n_layer"]) if "c_proj" in name else 1
    std = model["initializer_range"] / narrower
    return torch.empty_like(old).normal_(0.0, std, generator=generator)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
