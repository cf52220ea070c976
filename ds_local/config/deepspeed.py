"""The rest of ds_config.json: what must hold for it under a local pipeline.

DeepSpeed accepts misspelt top-level keys in silence, so those we or our users rely on are checked
here, and what DeepSpeed cannot do correctly under a pipeline is refused with the reason. What only
DeepSpeed's own classes know is checked in `engine/deepspeed_checks.py`. All of this happens before
any process group starts.

No torch, no DeepSpeed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ds_local.config.deepspeed_rules import (
    AUTO,
    DEEPSPEED_KEYS,
    FP32_ONLY,
    NAMED,
    NUMBERS,
    OWN_AUTO,
    REFUSED,
    SECTIONS,
    Path,
)
from ds_local.config.files import check_finite, leaves, nearest
from ds_local.config.lr_schedule import scheduler_of
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Refuse misspelt keys, wrong types and features that do not work under a local pipeline.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    for key in config:
        if key not in DEEPSPEED_KEYS:
            close = difflib.get_close_matches(str(key), DEEPSPEED_KEYS, n=1, cutoff=0.8)
            if close:
                raise ConfigError(f"{key!r} is not a DeepSpeed key; did you mean {close[0]!r}?")
    check_finite(config)
    for path, value in leaves(config):
        known = path[0] in DEEPSPEED_KEYS
        if value == "auto" and known and not any(path[: len(own)] == own for own in OWN_AUTO):
            instead = AUTO.get(path[-1], "remove it, so that DeepSpeed's default holds")
            raise ConfigError(
                f'{".".join(path)} is "auto", which only Hugging Face\'s Trainer fills in; '
                f"{instead}"
            )
    for key in SECTIONS:
        if not isinstance(config.get(key, {}), Mapping):
            hint = ', as in {"enabled": true}' if isinstance(config[key], bool) else ""
            raise ConfigError(
                f"{key} must be an object with keys of its own{hint}, got {config[key]!r}"
            )
    for section, (keys, example) in NAMED.items():
        for key in config.get(section, {}):
            if key not in keys:
                raise ConfigError(
                    f"{section}.{key} is not a key DeepSpeed knows; {nearest(str(key), keys)}"
                )
        if section in config and not config[section].get("type"):
            raise ConfigError(f'{section} has no type; write one, such as "type": "{example}"')
    for path, (kind, least, most) in NUMBERS.items():
        value = _at(config, path)
        if value is not None:
            check_number(".".join(path), value, kind, least, most)
    scheduler_of(config)
    _refuse(config, REFUSED, "")
    if _at(config, (SECTION, "clip_multipliers")) and not config.get("gradient_clipping"):
        raise ConfigError(
            f"{SECTION}.clip_multipliers are factors on gradient_clipping, which is not set; set "
            "it, such as to 1.0, or leave them out"
        )
    if bf16_enabled(config) or zero_stage(config):
        _refuse(config, FP32_ONLY, ", which needs fp32 and ZeRO stage 0")


def bf16_enabled(config: Mapping[str, Any]) -> bool:
    return any(bool(_at(config, (key, "enabled"))) for key in ("bf16", "bfloat16"))


def precision_of(config: Mapping[str, Any]) -> str:
    return "bf16" if bf16_enabled(config) else "fp32"


def zero_stage(config: Mapping[str, Any]) -> int:
    return _at(config, ("zero_optimization", "stage")) or 0


def check_number(
    name: str, value: Any, kind: type = int, least: float = 1, most: float = math.inf
) -> None:
    """Raises ConfigError when `value` is no `kind` (int, or float for any number) between the
    bounds."""
    right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not right or not least <= value <= most:
        what = "an integer" if kind is int else "a number"
        bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise ConfigError(f"{name} must be {what} of {bounds}, got {value!r}")


def _refuse(
    config: Mapping[str, Any], table: tuple[tuple[Path, Any, str], ...], needs: str
) -> None:
    for path, wrong, reason in table:
        found = _at(config, path)
        if found is not None and wrong(found):
            raise ConfigError(f"{'.'.join(path)} is {found!r}{needs}: {reason}")


def _at(config: Any, path: Path) -> Any:
    """The value under these keys from the top down, None when there is none."""
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def batch_sizes(config: Mapping[str, Any], num_replicas: int) -> tuple[int, int]:
    """(sequences per micro-batch, micro-batches per step), from any two of DeepSpeed's three batch
    keys.

    Raises:
        ConfigError: when they contradict each other or the number of replicas.
    """
    total = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    if total is None and micro is None:
        raise ConfigError(
            "set train_micro_batch_size_per_gpu and gradient_accumulation_steps, or "
            "train_batch_size"
        )
    if micro is None:
        accumulation = accumulation or 1
        micro = (total or 0) // (accumulation * num_replicas)
    elif accumulation is None:
        accumulation = 1 if total is None else total // (micro * num_replicas)
    if (
        not micro
        or not accumulation
        or (total is not None and total != micro * accumulation * num_replicas)
    ):
        raise ConfigError(
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation} x {num_replicas} replicas; change one of "
            "them, or leave train_batch_size out"
        )
    return micro, accumulation


def adamw(learning_rate: float) -> dict[str, Any]:
    """The "optimizer" of pretraining: of every study, and of what the planner writes."""
    return {
        "type": "AdamW",
        "params": {
            "lr": learning_rate,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "torch_adam": True,
        },
    }


def cosine(steps: int, warm_up: int) -> dict[str, Any]:
    """A "scheduler": warm-up, then a cosine down to a tenth."""
    return {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": steps,
            "warmup_num_steps": warm_up,
            "cos_min_ratio": 0.1,
        },
    }


def stable_decay(steps: int, warm_up: int, decay: int) -> dict[str, Any]:
    """A "scheduler": warm-up, a constant rate, a line to zero over the last `decay` steps."""
    return {
        "type": "WarmupStableDecayLR",
        "params": {
            "total_num_steps": steps,
            "warmup_num_steps": warm_up,
            "decay_num_steps": decay,
        },
    }
