"""What `scripts/train.py` was told: the config file, and what the command line says instead."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.files import load_config, local_parallel
from ds_local.config.scheme import Row, Scheme
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
    local_parallel(config)
    config[SECTION] = overridden_section(config.get(SECTION, {}), args)
    local_parallel(config)
    return config


def overridden_section(section: Mapping[str, Any], args: Namespace) -> dict[str, Any]:
    """The "local_parallel" section with what the command line says instead.

    Another --mode replaces the whole scheme; what goes with the mode that the section has stays.

    Raises:
        ConfigError: when an option lacks another, naming it.
    """
    section = dict(section)
    if args.mode is not None or args.backprop_micro_batches is not None:
        row, beside = _kept(section, args)
        for key in (*Scheme.model_fields, "phases", "cycle_steps"):
            section.pop(key, None)
        if args.window is not None:
            row["window"] = args.window
        if args.backprop_micro_batches:
            few = {"mode": "backprop", "micro_batches": args.backprop_micro_batches}
            scheme = {"mix": [few, row], **beside}
        else:
            scheme = {**row, **beside}
        if args.backprop_from is not None:
            phases = [{**scheme, "until_step": args.backprop_from}, {"mode": "backprop"}]
            scheme = {"phases": phases}
        section |= scheme
    elif args.window is not None or args.backprop_from is not None:
        raise ConfigError("--window and --backprop-from need --mode or --backprop-micro-batches")
    for key in ("num_stages", "segments_per_stage", "seed"):
        if getattr(args, key) is not None:
            section[key] = getattr(args, key)
    return section


def _kept(section: Mapping[str, Any], args: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row that all but the asked number of micro-batches follow, options of the scheme beside it),
    as far as the section has them for the wanted mode."""
    rows = section.get("mix") or [section]
    others = [row for row in rows if row.get("mode", "local") != "backprop"] or rows[-1:]
    one = "phases" not in section and len(others) == 1
    if args.mode is None and not one:
        has = "phases" if "phases" in section else "a mix of several rows"
        raise ConfigError(
            f"--backprop-micro-batches {args.backprop_micro_batches} does not say what the other "
            f"micro-batches follow, and {SECTION} has {has}; give --mode"
        )
    mode = others[0].get("mode", "local")
    if not one or args.mode not in (None, mode):
        return {"mode": args.mode}, {}
    row = {key: others[0][key] for key in Row.model_fields if key in others[0]}
    options = Scheme.model_fields.keys() - {*Row.model_fields, "mix"}
    return {"mode": mode, **row}, {key: section[key] for key in options if key in section}
