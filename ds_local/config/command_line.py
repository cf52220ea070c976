"""What `scripts/train.py` was told: the config file, and what the command line says instead."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.files import load_config, local_parallel
from ds_local.config.scheme import Scheme
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError


def read_settings(args: Namespace) -> dict[str, Any]:
    """The whole DeepSpeed config of a run, checked as far as that goes without DeepSpeed.

    Raises:
        ConfigError: naming the key.
    """
    config = load_config(args.deepspeed_config)
    check_deepspeed(config)
    asked, there = args.backprop_micro_batches, config.get("gradient_accumulation_steps")
    if isinstance(asked, int) and isinstance(there, int) and asked > there:
        raise ConfigError(
            f"--backprop-micro-batches {asked} exceeds gradient_accumulation_steps, which is "
            f"{there}"
        )
    config[SECTION] = overridden_section(config.get(SECTION, {}), args)
    local_parallel(config)
    return config


def overridden_section(section: Mapping[str, Any], args: Namespace) -> dict[str, Any]:
    """The "local_parallel" section with what the command line says instead."""
    section = dict(section)
    if args.mode is not None or args.backprop_micro_batches is not None:
        for key in (*Scheme.model_fields, "phases", "cycle_steps"):
            section.pop(key, None)
        row = {"mode": args.mode or "local"} | (
            {} if args.window is None else {"window": args.window}
        )
        if args.backprop_micro_batches:
            section["mix"] = [
                {"mode": "backprop", "micro_batches": args.backprop_micro_batches},
                row,
            ]
        else:
            section |= row
        if args.backprop_from is not None:
            scheme = {key: section.pop(key) for key in ("mode", "window", "mix") if key in section}
            section["phases"] = [{**scheme, "until_step": args.backprop_from}, {"mode": "backprop"}]
    elif args.window is not None or args.backprop_from is not None:
        raise ConfigError("--window and --backprop-from need --mode or --backprop-micro-batches")
    for key in ("num_stages", "segments_per_stage", "seed"):
        if getattr(args, key) is not None:
            section[key] = getattr(args, key)
    return section
