"""What a run is given, checked, and what run.json says of it."""

from __future__ import annotations

import math
import os
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_local.config.command_line import read_settings
from ds_local.data.dataset import TokenData
from ds_local.data.tokenizers import check_same_tokenizer
from ds_local.engine.deepspeed_checks import checked
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.optimizer_checks import check_client_parts
from ds_local.errors import ConfigError
from ds_local.model import families
from ds_local.model.document_mask import check_keeps_documents_apart
from ds_local.model.flops import auxiliary_shares
from ds_local.model.pretrained import find_weights
from ds_local.schedules.replay import grid_of
from ds_local.schedules.schedule import Schedule
from ds_local.training.banner import Length, PhaseForecast, parameters_of
from ds_local.training.units import check_unit

VOCABULARY_PADDING = (
    128  # a model's vocabulary may be rounded up by less than this, as is usual for speed
)


def read_inputs(args: Namespace) -> tuple[dict[str, Any], TokenData, Any]:
    """Config, data and model of a run, checked against each other.

    Raises:
        ConfigError: naming the two values that contradict each other.
        UnsupportedModel: when it cannot keep documents apart and the data asks for that.
    """
    config, section = checked(read_settings(args))
    check_unit(args, section)
    if args.eval_ema and section.ema is None:
        raise ConfigError(
            "--eval-ema validates running averages of the weights, which the config does not ask "
            'for; set "ema" in its local_parallel section, such as 0.999'
        )
    check_client_parts(config, None, None)
    # the files are compared with their checksums once on each host
    data = TokenData(args.data, verify=os.environ.get("LOCAL_RANK", "0") == "0")
    hf_config = families.load_model_config(args.model)
    padding = hf_config.vocab_size - data.vocab_size
    weights = None if args.from_scratch or args.resume else find_weights(args.model)
    same_tokens = weights is not None and check_same_tokenizer(weights, data.tokenizer_folder)
    if padding < 0 or (padding >= VOCABULARY_PADDING and not same_tokens and not args.resume):
        raise ConfigError(
            f"{args.model} has vocab_size {hf_config.vocab_size} but the tokenizer in {args.data} "
            f"has {data.vocab_size} tokens; set vocab_size to {data.vocab_size}, or prepare the "
            "data with another tokenizer"
        )
    if data.seq_len > families.num_positions(hf_config):
        raise ConfigError(
            f"{args.data} has sequences of {data.seq_len} tokens but {args.model} takes at most "
            f"{families.num_positions(hf_config)}; prepare the data with a smaller --seq-len"
        )
    if data.facts["document_mask"]:
        check_keeps_documents_apart(hf_config)
    hf_config.bos_token_id = hf_config.eos_token_id = data.facts["eos_token_id"]
    return config, data, hf_config


def length_of(args: Namespace, data: TokenData, per_step: int) -> Length:
    """How long a run is, in steps, whether its steps or its epochs were given.

    Args:
        per_step: sequences of a step, all replicas together.

    Raises:
        ConfigError: when neither or both were.
    """
    if (args.max_steps is None) == (args.epochs is None):
        raise ConfigError("give either --max-steps or --epochs, which say how long the run is")
    sequences = data.num_sequences("train")
    steps = args.max_steps
    if args.epochs is not None:
        steps = max(1, math.ceil(args.epochs * sequences / per_step))
    return Length(steps, per_step, data.seq_len, sequences)


def length_from(length: Length, epochs: float | None, step: int, seen: int) -> Length:
    """The length of a run that goes on: the number of sequences in a step may have changed.

    Args:
        epochs: that were asked for, if not a number of steps.
        step: that it goes on from.
        seen: sequences in the steps before.
    """
    steps, more = length.steps, seen - step * length.per_step
    if epochs is not None:
        steps = max(1, math.ceil((epochs * length.sequences - more) / length.per_step))
    return length._replace(steps=steps, more=more)


def facts_of_start(
    args: Namespace,
    asked: Mapping[str, Any],
    config: dict[str, Any],
    hf_config: Any,
    data: TokenData,
    replicas: int,
) -> dict[str, Any]:
    """What run.json says of a start before there is an engine."""
    return {
        "arguments": asked,
        "config": config,
        "model": families.config_dict(hf_config),
        "weights": _name_of_weights(args),
        "data": {"folder": str(data.folder), **data.facts},
        "layout": {"replicas": replicas},
        "versions": {
            name: version(name)
            for name in ("ds_local", "torch", "deepspeed", "transformers", "datasets")
        }
        | {"python": platform.python_version()},
    }


def layout_of(
    engine: LocalPipelineEngine,
    data: TokenData,
    hosts: dict[str, Any],
    phases: Sequence[PhaseForecast],
) -> dict[str, Any]:
    """What run.json says of the engine. A collective call."""
    schedules = engine.plan.schedules
    return {
        "layout": {
            "stages": engine.module.pipeline_stages,
            "replicas": engine.module.unit.num_replicas
            if engine.module.unit
            else engine.dp_world_size,
            "segments": engine.num_segments,
            "segment_parts": engine.module.segment_parts,
            **parameters_of(engine),
            "predicted_idle": [phase.idle for phase in phases],
            "auxiliary_flops": [_shares(engine, schedule, data.seq_len) for schedule in schedules],
            "hosts": hosts,
        },
        "routes": [list(dict.fromkeys(map(str, s.rows))) for s in schedules],
        "schedules": [grid_of(s).splitlines() for s in schedules],
        "machine": {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "device": str(engine.device),
        },
    }


def _shares(engine: LocalPipelineEngine, schedule: Schedule, seq_len: int) -> list[float]:
    shares = auxiliary_shares(
        engine.module.hf_config, engine.section, schedule, engine.module.segment_parts, seq_len
    )
    return [round(share, 4) for share in shares]


def _name_of_weights(args: Namespace) -> str | None:
    """Of the pretrained weights that a run started from: a folder's or hub name."""
    if args.from_scratch or args.resume or find_weights(args.model) is None:
        return None
    return Path(args.model).resolve().name if Path(args.model).exists() else args.model
