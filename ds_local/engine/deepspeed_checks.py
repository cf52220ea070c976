"""What DeepSpeed reads of ds_config.json, checked by DeepSpeed's own classes before ranks meet.

Each section is checked against the config class that DeepSpeed will make of it, or against the keys
and defaults it has for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime import constants
from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from deepspeed.runtime.config import (
    DeepSpeedConfig,
    DtypeEnum,
    get_aio_config,
    get_pipeline_config,
)
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import get_log_level_from_string
from pydantic import BaseModel, ValidationError

from ds_local.config.deepspeed import bf16_enabled, check_deepspeed, zero_stage
from ds_local.config.deepspeed_rules import DEEPSPEED_KEYS
from ds_local.config.files import load_config, local_parallel, must_be
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.engine.optimizer_checks import check_optimizer, check_scheduler, cpp_compiler
from ds_local.engine.value_checks import check_builds, check_keys
from ds_local.errors import ConfigError

_MODELS: dict[tuple[str, ...], type[BaseModel]] = {
    ("zero_optimization",): DeepSpeedZeroConfig,
    ("bf16",): DeepSpeedBF16Config,
    ("bfloat16",): DeepSpeedBF16Config,
    ("fp16",): DeepSpeedFP16Config,
    ("tensorboard",): TensorBoardConfig,
    ("wandb",): WandbConfig,
    ("csv_monitor",): CSVConfig,
    ("comet",): CometConfig,
    ("comms_logger",): CommsLoggerConfig,
    ("compile",): CompileConfig,
    ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
}

# sections without a class: every key that DeepSpeed reads there, with its default
_DEFAULTS: dict[tuple[str, ...], dict[str, Any]] = {
    ("optimizer",): {"type": "", "params": {}, constants.LEGACY_FUSION: False},
    ("scheduler",): {"type": "", "params": {}},
    ("flops_profiler",): vars(DeepSpeedFlopsProfilerConfig({})),
    ("activation_checkpointing",): vars(DeepSpeedActivationCheckpointingConfig({})),
    ("pipeline",): {**get_pipeline_config({}), "use_reentrant": True},
    ("timers",): {"throughput": {}},
    ("aio",): get_aio_config({}),
    ("checkpoint",): {
        constants.CHECKPOINT_TAG_VALIDATION: "",
        constants.LOAD_UNIVERSAL_CHECKPOINT: False,
        constants.USE_NODE_LOCAL_STORAGE_CHECKPOINT: False,
        constants.CHECKPOINT_PARALLEL_WRITE: {},
        "checkpoint_serialization": True,
        "writer": None,
    },
    ("checkpoint", constants.CHECKPOINT_PARALLEL_WRITE): {
        constants.CHECKPOINT_PARALLEL_WRITE_PIPELINE_STAGE: False
    },
    ("data_types",): dict.fromkeys(
        (
            constants.GRAD_ACCUM_DTYPE,
            constants.PARAM_DTYPE,
            constants.BUFFER_DTYPE,
            constants.KEEP_IN_FP32_MODULES,
        )
    ),
}

# top-level keys with plain values: DeepSpeed names each default NAME_DEFAULT
_SCALARS: dict[str, Any] = {
    key: getattr(constants, f"{name}_DEFAULT")
    for name, key in vars(constants).items()
    if isinstance(key, str) and hasattr(constants, f"{name}_DEFAULT")
}

# what DeepSpeed reads in parts of it that do not run here, or not at all
_UNREAD = (
    "disable_allgather",
    "seq_parallel_communication_data_type",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "zero_force_ds_cpu_optimizer",
)

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def checked(source: Any) -> tuple[dict[str, Any], LocalParallelConfig]:
    """A whole DeepSpeed config and its "local_parallel" section, with nothing left to find out
    later.

    Args:
        source: path or mapping.

    Raises:
        ConfigError: naming key, value and remedy.
    """
    config = load_config(source)
    check_deepspeed(config)
    section = local_parallel(config)
    check_settings(config)
    compiles = {"compile": section.compile, "head.kernel": section.head.kernel == "compiled"}
    if any(compiles.values()) and get_accelerator().device_name() == "cpu" and not cpp_compiler():
        key = next(key for key, asked in compiles.items() if asked)
        raise ConfigError(
            f"{SECTION}.{key} needs a C++ compiler on a CPU and there is none; install g++, or "
            "remove the key"
        )
    return config, section


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would refuse later, or read as something else, in the rest of the file.

    Raises:
        ConfigError: naming key, value and remedy.
    """
    _check_depth(config)
    for path, value in _sections(config, _DEFAULTS):
        check_keys(path, value, _kinds(_DEFAULTS[path]))
    for path, value in _sections(config, _MODELS):
        fields = _MODELS[path].model_fields
        kinds = {key: field.annotation for key, field in fields.items()}
        kinds |= {field.alias: field.annotation for field in fields.values() if field.alias}
        check_keys(path, value, kinds)
        try:
            _MODELS[path](**value)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join([*path, *map(str, first["loc"])])
            raise ConfigError(must_be(name, [first])) from None
    check_keys((), {k: v for k, v in config.items() if k in _SCALARS}, _kinds(_SCALARS))
    _check_monitors(config)
    _check_precision(config)
    check_optimizer(config)
    check_scheduler(config)
    rest = {key: value for key, value in config.items() if key not in _BATCH}

    def read(**rest: Any) -> None:
        DeepSpeedConfig({**rest, **dict.fromkeys(_BATCH, 1)}, _OneReplica())

    check_builds("{}", "DeepSpeed refuses the config", read, rest)
    level = {"log_level": config["log_level"]} if config.get("log_level") else {}
    check_builds("{}", "", lambda log_level="info": get_log_level_from_string(log_level), level)


def _check_depth(config: Mapping[str, Any]) -> None:
    """Refuse a key at the top that would be read in a section."""
    keys: dict[str, Iterable[str]] = {
        SECTION: LocalParallelConfig.model_fields,
        **{".".join(path): _DEFAULTS[path] for path in _DEFAULTS},
        **{".".join(path): _MODELS[path].model_fields for path in _MODELS},
        "optimizer.params": ("lr", "betas", "eps", "weight_decay", "momentum"),
    }
    for key in config.keys() - set(DEEPSPEED_KEYS):
        places = [where for where, known in keys.items() if key in known]
        if places:
            more = f" or {len(places) - 1} other sections" if len(places) > 1 else ""
            raise ConfigError(
                f"{key} is {config[key]!r}, but nothing reads it at the top of the file; move it "
                f"into {places[0]}{more}, or remove it"
            )


def unread(config: Mapping[str, Any]) -> list[str]:
    """What is at the top of a config and nothing reads, in sentences. Notes of one's own begin with
    $ or _."""
    known = set(DEEPSPEED_KEYS) - {key for key in _UNREAD if config.get(key)}
    return [
        f"nothing reads {key!r}, which is {config[key]!r} in the DeepSpeed config"
        for key in config
        if key not in known and key[:1] not in ("$", "_")
    ]


_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class _OneReplica:
    """In the place of the process grid."""

    def get_data_parallel_world_size(self) -> int:
        return 1


def _sections(
    config: Mapping[str, Any], paths: Mapping[tuple[str, ...], Any]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The given sections that the config has."""
    for path in paths:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield path, value


def _kinds(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {key: type(default) for key, default in defaults.items()}


def _check_monitors(config: Mapping[str, Any]) -> None:
    for monitor, package in _PACKAGES.items():
        if config.get(monitor, {}).get("enabled") and find_spec(package) is None:
            raise ConfigError(
                f"{monitor}.enabled needs the package {package}, which is not installed: run pip "
                f"install {package}, or set it to false"
            )
    for monitor in ("csv_monitor", "tensorboard"):
        settings = config.get(monitor, {})
        if settings.get("enabled"):
            folder = Path(settings.get("output_path") or ".").absolute()
            while not folder.exists():
                folder = folder.parent
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise ConfigError(
                    f"{monitor}.output_path is {settings.get('output_path')!r}, but nothing can be "
                    f"written below {folder}; give another folder"
                )


def _check_precision(config: Mapping[str, Any]) -> None:
    bf16 = bf16_enabled(config)
    if "bf16" in config and "bfloat16" in config:
        raise ConfigError("bfloat16 is bf16's old name and both are there; remove bfloat16")
    if bf16 and not get_accelerator().is_bf16_supported():
        device = get_accelerator().device_name()
        raise ConfigError(f"bf16.enabled is true, but this {device} has no bf16; set it to false")
    own = torch.bfloat16 if bf16 else torch.float32
    for key, text in config.get("data_types", {}).items():
        if text is None or key == constants.KEEP_IN_FP32_MODULES:
            continue
        try:
            dtype = DtypeEnum(text).value
        except (KeyError, ValueError):
            raise ConfigError(
                f'data_types.{key} is {text!r}; write "fp32" or "bf16", or remove it'
            ) from None
        sums_in_fp32 = (
            key == constants.GRAD_ACCUM_DTYPE and zero_stage(config) and dtype == torch.float32
        )
        if key != constants.BUFFER_DTYPE and dtype != own and not sums_in_fp32:
            raise ConfigError(
                f"data_types.{key} is {text!r} but the weights are "
                f"{str(own).removeprefix('torch.')}; make them agree, or remove it"
            )
