"""What DeepSpeed reads of ds_config.json, checked by DeepSpeed's own classes before ranks meet.

Sections are checked against the config classes that DeepSpeed will make of them, or against the
keys and defaults it has for them; optimizer and scheduler are made once, on one small parameter, by
the class that DeepSpeed will pick. Nothing here knows a parameter by name that a signature knows.
"""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime import constants, lr_schedules
from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from deepspeed.runtime.config import (
    DEEPSPEED_OPTIMIZERS,
    DeepSpeedConfig,
    DtypeEnum,
    get_aio_config,
    get_pipeline_config,
)
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import logger
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import get_log_level_from_string
from pydantic import BaseModel, ValidationError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.files import load_config, local_parallel, must_be, nearest
from ds_local.config.schema import SECTION, LocalParallelConfig
from ds_local.engine.deepspeed_seam import MUON_PARAMETERS
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

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
_FUSED: dict[str, tuple[type[Optimizer], str]] = {
    "adam": (FusedAdam, "FusedAdamBuilder"),
    "adamw": (FusedAdam, "FusedAdamBuilder"),
    "lamb": (FusedLamb, "FusedLambBuilder"),
    "lion": (FusedLion, "FusedLionBuilder"),
}
_ADAM_SWITCHES = {"torch_adam": bool, "adam_w_mode": bool, "fp32_optimizer_states": bool}


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
    if section.compile and get_accelerator().device_name() == "cpu" and not _cpp_compiler():
        raise ConfigError(
            f"{SECTION}.compile needs a C++ compiler on a CPU and there is none; install g++, or "
            "remove the key"
        )
    return config, section


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would refuse later, or read as something else, in the rest of the file.

    Raises:
        ConfigError: naming key, value and remedy.
    """
    for path, value in _sections(config, _DEFAULTS):
        _check_keys(path, value, _kinds(_DEFAULTS[path]))
    for path, value in _sections(config, _MODELS):
        fields = _MODELS[path].model_fields
        kinds = {key: field.annotation for key, field in fields.items()}
        kinds |= {field.alias: field.annotation for field in fields.values() if field.alias}
        _check_keys(path, value, kinds)
        try:
            _MODELS[path](**value)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join([*path, *map(str, first["loc"])])
            raise ConfigError(must_be(name, [first])) from None
    _check_keys((), {k: v for k, v in config.items() if k in _SCALARS}, _kinds(_SCALARS))
    _check_monitors(config)
    _check_precision(config)
    _check_optimizer(config)
    _check_scheduler(config)
    rest = {key: value for key, value in config.items() if key not in _BATCH}

    def read(**rest: Any) -> None:
        DeepSpeedConfig({**rest, **dict.fromkeys(_BATCH, 1)}, _OneReplica())

    _try("{}", "DeepSpeed refuses the config", read, rest)
    level = {"log_level": config["log_level"]} if config.get("log_level") else {}
    _try("{}", "", lambda log_level="info": get_log_level_from_string(log_level), level)


_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class _OneReplica:
    """In the place of the process grid."""

    def get_data_parallel_world_size(self) -> int:
        return 1


# --- keys and kinds -----------------------------------------------------------------------------


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


def _check_keys(path: tuple[str, ...], given: Any, kinds: Mapping[str, Any]) -> None:
    """Every key is known, and its value of the kind (type or annotation) that is expected."""
    where = ".".join(path)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be an object with keys of its own, got {given!r}")
    for key, value in given.items():
        name = f"{where}.{key}" if where else key
        if key not in kinds:
            raise ConfigError(f"{name} is not a key DeepSpeed knows; {nearest(key, list(kinds))}")
        wanted = _wanted(value, kinds[key])
        if wanted:
            unquoted = "; remove the quotes" if wanted.startswith("a") and _is_number(value) else ""
            raise ConfigError(f"{name} must be {wanted}, got {value!r}{unquoted}")


def _wanted(value: Any, kind: Any) -> str:
    """What should stand here, when `value` is of another kind; "" when it fits, or any kind
    does."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        if value is None and len(kinds) < len(typing.get_args(kind)):
            return ""
        if torch.Tensor in kinds:  # a number, as far as JSON goes
            kinds.remove(torch.Tensor)
        kind = kinds[0] if len(kinds) == 1 else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is int:
        return "" if number and float(value).is_integer() else "an integer"
    if kind is float:
        return "" if number else "a number"
    if kind is str:
        return "" if isinstance(value, str) else "a string"
    if kind is dict:
        return "" if isinstance(value, Mapping) else "an object with keys of its own"
    return ""


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _one_sentence(error: BaseException) -> str:
    """The first line of an error, its sentences joined, without web pages."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    parts = [part.strip().rstrip(".") for part in line.split(". ")]
    return "; ".join(part for part in parts if "http" not in part)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """What is only tried out says nothing on the console."""
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


# --- monitors and precision ---------------------------------------------------------------------


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


def _enabled(config: Mapping[str, Any], *keys: str) -> bool:
    return any(config.get(key, {}).get("enabled", False) for key in keys)


def _check_precision(config: Mapping[str, Any]) -> None:
    bf16 = _enabled(config, "bf16", "bfloat16")
    if "bf16" in config and "bfloat16" in config:
        raise ConfigError("bfloat16 is bf16's old name and both are there; remove bfloat16")
    if bf16 and not get_accelerator().is_bf16_supported():
        device = get_accelerator().device_name()
        raise ConfigError(f"bf16.enabled is true, but this {device} has no bf16; set it to false")
    own = torch.bfloat16 if bf16 else torch.float32
    zero = config.get("zero_optimization", {}).get("stage", 0)
    for key, text in config.get("data_types", {}).items():
        if text is None or key == constants.KEEP_IN_FP32_MODULES:
            continue
        try:
            dtype = DtypeEnum(text).value
        except (KeyError, ValueError):
            raise ConfigError(
                f'data_types.{key} is {text!r}; write "fp32" or "bf16", or remove it'
            ) from None
        sums_in_fp32 = key == constants.GRAD_ACCUM_DTYPE and zero and dtype == torch.float32
        if key != constants.BUFFER_DTYPE and dtype != own and not sums_in_fp32:
            raise ConfigError(
                f"data_types.{key} is {text!r} but the weights are {str(own).removeprefix('torch.')}; "
                "make them agree, or remove it"
            )


# --- optimizer ----------------------------------------------------------------------------------


def _check_optimizer(config: Mapping[str, Any]) -> None:
    settings = config.get("optimizer")
    if settings is None:
        return
    name = settings.get("type")
    if not name:
        raise ConfigError('optimizer has no type; write one, such as "type": "AdamW"')
    params = dict(settings.get("params") or {})
    if "max_grad_norm" in params:
        raise ConfigError(
            "optimizer.params.max_grad_norm: write gradient_clipping instead, at the top"
        )
    cls, params = _optimizer_class(name, params)
    if cls is None:
        return
    if config.get("zero_optimization", {}).get("stage", 0):
        _check_zero(cls, name, config)
    _check_parameters("optimizer.params", name, cls, params)
    stand_in = _stand_in(cls)
    known = inspect.signature(stand_in).parameters
    shared = {key: value for key, value in params.items() if key in known}
    whole = f"optimizer.type {name!r} does not work here"
    build = lambda **given: _stepped(stand_in([_toy()], **given))  # noqa: E731
    _try("optimizer.params.{}", whole, build, shared)


def _optimizer_class(
    name: str, params: dict[str, Any]
) -> tuple[type[Optimizer] | None, dict[str, Any]]:
    """(the class that DeepSpeed makes for a name, the parameters it is given); None for Muon, whose
    parameters are checked here."""
    own = name.lower() if name.lower() in DEEPSPEED_OPTIMIZERS else None
    if own in ("adam", "adamw", "muon"):
        switches = {key: params.pop(key) for key in _ADAM_SWITCHES if key in params}
        _check_keys(("optimizer", "params"), switches, _ADAM_SWITCHES)
        if switches.get("torch_adam") and own != "muon":
            decoupled = own == "adamw" or switches.get("adam_w_mode", True)
            return (torch.optim.AdamW if decoupled else torch.optim.Adam), params
    if own == "muon":
        _check_keys(("optimizer", "params"), params, MUON_PARAMETERS)
        return None, params
    if own in _FUSED:
        cls, builder = _FUSED[own]
        _check_fused(name, builder)
        return cls, params
    if own is not None and own.startswith("mu"):
        if find_spec("mup") is None:
            raise ConfigError(f"optimizer.type {name!r} needs the package mup: run pip install mup")
        return None, params
    if own == "adagrad":
        return torch.optim.Adagrad, params
    found = getattr(torch.optim, name, None)
    if inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer:
        return found, params
    names = {"AdamW": "", "Adam": "", "Lion": "", "Lamb": "", "Muon": ""} | {
        key: "" for key, value in vars(torch.optim).items() if inspect.isclass(value)
    }
    raise ConfigError(f"optimizer.type {name!r} is unknown; {_nearest_name(name, names)}")


def _nearest_name(name: str, names: Mapping[str, Any]) -> str:
    """A suggestion that does not mind upper and lower case."""
    lower = {one.lower(): one for one in names if one not in ("Optimizer", "LRScheduler")}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    known = ", ".join(sorted(lower.values()))
    return f"did you mean {lower[close[0]]!r}?" if close else f"known are {known}"


def _check_fused(name: str, builder: str) -> None:
    device = get_accelerator().device_name()
    if get_accelerator().get_op_builder(builder).__name__ == "NotImplementedBuilder":
        raise ConfigError(
            f"optimizer.type {name!r} has no version for {device} in DeepSpeed; use AdamW with "
            '"torch_adam": true'
        )
    if device == "cpu" and not _cpp_compiler():
        raise ConfigError(
            f"optimizer.type {name!r} is compiled at start on a CPU and there is no C++ compiler; "
            'add "torch_adam": true to optimizer.params, or install g++'
        )


def _check_zero(cls: type[Optimizer], name: str, config: Mapping[str, Any]) -> None:
    if cls not in ZERO_SUPPORTED_OPTIMIZERS and not config.get("zero_allow_untested_optimizer"):
        raise ConfigError(
            f"optimizer.type {name!r} is untested with ZeRO in DeepSpeed; use AdamW, set "
            'zero_optimization.stage to 0, or "zero_allow_untested_optimizer": true'
        )


def check_client_parts(config: Mapping[str, Any], optimizer: Any, scheduler: Any) -> None:
    """The optimizer and scheduler that a script passes, beside what the config says.

    Raises:
        ConfigError: when there is no optimizer at all, or one that DeepSpeed would not take.
    """
    if optimizer is None and "optimizer" not in config:
        raise ConfigError(
            "there is no optimizer: add one to the config, such as "
            '"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}, or pass optimizer=...'
        )
    if optimizer is not None and not (isinstance(optimizer, Optimizer) or callable(optimizer)):
        raise ConfigError(
            f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer, or a function "
            "that makes one of parameters"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(optimizer, Optimizer) and stage:
        _check_zero(type(optimizer), type(optimizer).__name__, config)
    if isinstance(scheduler, LRScheduler) and not isinstance(optimizer, Optimizer):
        raise ConfigError(
            "lr_scheduler belongs to an optimizer that initialize does not get; pass optimizer=... "
            "too, or a function that makes the scheduler of an optimizer"
        )


# --- scheduler ----------------------------------------------------------------------------------

_CHOICES = {
    lr_schedules.WARMUP_TYPE: (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
}


def _check_scheduler(config: Mapping[str, Any]) -> None:
    settings = config.get("scheduler")
    if settings is None:
        return
    name = settings.get("type")
    if not name:
        raise ConfigError('scheduler has no type; write one, such as "type": "WarmupCosineLR"')
    params = settings.get("params")
    if params is None:
        raise ConfigError('scheduler has no params; write them, at least "params": {}')
    names = {key: getattr(lr_schedules, key) for key in lr_schedules.VALID_LR_SCHEDULES}
    of_torch = {
        key: value
        for key, value in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, LRScheduler | ReduceLROnPlateau)
    }
    cls = names.get(name) or of_torch.get(name)
    if cls is None or cls is LRScheduler:
        raise ConfigError(
            f"scheduler.type {name!r} is unknown; {_nearest_name(name, {**of_torch, **names})}"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if name not in names and (stage or _enabled(config, "bf16", "bfloat16")):
        raise ConfigError(
            f"scheduler.type {name!r} is torch's, which cannot drive DeepSpeed's bf16 and ZeRO "
            f"optimizers; use one of {', '.join(names)}"
        )
    _check_parameters("scheduler.params", name, cls, params)
    for key, choices in _CHOICES.items():
        if params.get(key, choices[0]) not in choices:
            raise ConfigError(
                f"scheduler.params.{key} is {params[key]!r}; write one of {', '.join(choices)}"
            )

    def build(**given: Any) -> None:
        optimizer = _toy_optimizer(config)
        scheduler = cls(optimizer, **given)
        for _ in range(2):
            _stepped(optimizer)
            scheduler.step()

    whole = f"scheduler.type {name!r} does not work here"
    _try("scheduler.params.{}", whole, build, params)


def _toy_optimizer(config: Mapping[str, Any]) -> Optimizer:
    """Of the class that the config asks for, or Adam."""
    settings = config.get("optimizer", {"type": "Adam"})
    cls = _optimizer_class(settings["type"], dict(settings.get("params") or {}))[0]
    cls = _stand_in(cls or torch.optim.AdamW)
    given = {
        k: v for k, v in settings.get("params", {}).items() if k in ("lr", "momentum", "betas")
    }
    known = inspect.signature(cls).parameters
    return cls([_toy()], **{key: value for key, value in given.items() if key in known})


# --- trying out ---------------------------------------------------------------------------------


def _check_parameters(
    where: str, name: str, cls: Callable[..., Any], given: Mapping[str, Any]
) -> None:
    """Names, kinds and signs by the signature of the class; what it needs is there."""
    parameters: Mapping[str, inspect.Parameter] = MappingProxyType(
        dict(list(inspect.signature(cls).parameters.items())[1:])
    )  # without what it is made for: parameters, or an optimizer
    for key in given:
        if key not in parameters:
            raise ConfigError(
                f"{where}.{key} is not a parameter of {name}; {nearest(key, list(parameters))}"
            )
    for key, one in parameters.items():
        if key not in given and one.default is one.empty and one.kind is not one.VAR_KEYWORD:
            raise ConfigError(f"{where} has no {key}, which {name} needs; add it")
    for key, value in given.items():
        _check_parameter(f"{where}.{key}", value, parameters[key], key.startswith("last_"))


def _check_parameter(
    name: str, value: Any, parameter: inspect.Parameter, may_be_negative: bool
) -> None:
    default, wanted = parameter.default, ""
    pair = isinstance(default, tuple)
    if pair and (not isinstance(value, list | tuple) or len(value) != len(default)):
        wanted = f"a list of {len(default)} numbers"
    values = value if isinstance(value, list | tuple) else [value]
    kind = _kind_of(parameter)
    wanted = wanted or next(filter(None, (_wanted(one, kind) for one in values)), "")
    if wanted:
        unquoted = "; remove the quotes" if any(map(_is_number, values)) else ""
        raise ConfigError(f"{name} must be {wanted}, got {value!r}{unquoted}")
    numbers = [one for one in values if isinstance(one, int | float)]
    if not may_be_negative and any(one < 0 for one in numbers):
        raise ConfigError(f"{name} must not be negative, got {value!r}")
    if name.endswith("_ratio") and any(one > 1 for one in numbers):
        raise ConfigError(f"{name} must be a share, 0 to 1, got {value!r}")
    if name.endswith("total_num_steps") and any(one < 1 for one in numbers):
        raise ConfigError(f"{name} must be at least 1, got {value!r}")


def _kind_of(parameter: inspect.Parameter) -> Any:
    """What the values of a parameter are: by its annotation, else by its default."""
    default = parameter.default
    if isinstance(default, tuple):
        return float
    if parameter.annotation is not parameter.empty and not isinstance(parameter.annotation, str):
        return parameter.annotation
    if isinstance(default, bool):
        return bool
    return float if isinstance(default, int | float) else None


def _try(name: str, whole: str, build: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Make it as DeepSpeed will. When that fails, the value without which it works is named.

    Args:
        name: of a value, with {} for its key.
        whole: what to say when it is not one value alone.
    """
    with _quiet(), torch.enable_grad():
        try:
            build(**given)
            return
        except Exception as error:  # whatever a class of DeepSpeed's or torch's says, asserts too
            failure = error
        for key, value in given.items():
            with suppress(Exception):
                build(**{other: given[other] for other in given if other != key})
                whole = f"{name.format(key)} is {value!r}"
                break
    raise ConfigError(f"{whole}: {_one_sentence(failure)}") from failure


def _toy() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    return parameter


def _stepped(optimizer: Optimizer) -> Optimizer:
    optimizer.step()
    return optimizer


def _stand_in(cls: type[Optimizer]) -> type[Optimizer]:
    """Torch's AdamW for a fused class, which would have to be compiled first."""
    return torch.optim.AdamW if cls in (FusedAdam, FusedLamb, FusedLion) else cls


def _cpp_compiler() -> str | None:
    """What torch's compiler and DeepSpeed's builders would use on a CPU."""
    return os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
    )
