"""Optimizer and scheduler of a config, and those that a script passes, before DeepSpeed makes them.

Their parameters are checked by the signature of the class that DeepSpeed will pick, then both are
made once, on one small parameter, and stepped. Nothing here knows a parameter by name that a
signature knows.
"""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ds_local.config.deepspeed import bf16_enabled, zero_stage
from ds_local.config.files import nearest
from ds_local.config.lr_schedule import SCHEDULERS, scheduler_of
from ds_local.engine.deepspeed_seam import MUON_PARAMETERS
from ds_local.engine.value_checks import check_builds, check_keys, check_kind
from ds_local.errors import ConfigError

_FUSED: dict[str, tuple[type[Optimizer], str]] = {
    "adam": (FusedAdam, "FusedAdamBuilder"),
    "adamw": (FusedAdam, "FusedAdamBuilder"),
    "lamb": (FusedLamb, "FusedLambBuilder"),
    "lion": (FusedLion, "FusedLionBuilder"),
}
_ADAM_SWITCHES = {"torch_adam": bool, "adam_w_mode": bool, "fp32_optimizer_states": bool}


# --- optimizer ---------------------------------------------------------------------------------


def check_optimizer(config: Mapping[str, Any]) -> None:
    settings = config.get("optimizer")
    if settings is None:
        return
    name = settings["type"]
    params = dict(settings.get("params") or {})
    if "max_grad_norm" in params:
        raise ConfigError(
            "optimizer.params.max_grad_norm: write gradient_clipping instead, at the top"
        )
    cls, params = _optimizer_class(name, params)
    if cls is None:
        return
    if zero_stage(config):
        _check_zero(cls, name, config)
    _check_parameters("optimizer.params", name, cls, params)
    stand_in = _stand_in(cls)
    known = inspect.signature(stand_in).parameters
    shared = {key: value for key, value in params.items() if key in known}
    whole = f"optimizer.type {name!r} does not work here"
    build = lambda **given: _stepped(stand_in([_toy()], **given))  # noqa: E731
    check_builds("optimizer.params.{}", whole, build, shared)


def _optimizer_class(
    name: str, params: dict[str, Any]
) -> tuple[type[Optimizer] | None, dict[str, Any]]:
    """(the class that DeepSpeed makes for a name, the parameters it is given); None for Muon, whose
    parameters are checked here."""
    own = name.lower() if name.lower() in DEEPSPEED_OPTIMIZERS else None
    if own in ("adam", "adamw", "muon"):
        switches = {key: params.pop(key) for key in _ADAM_SWITCHES if key in params}
        check_keys(("optimizer", "params"), switches, _ADAM_SWITCHES)
        if switches.get("torch_adam") and own != "muon":
            decoupled = own == "adamw" or switches.get("adam_w_mode", True)
            return (torch.optim.AdamW if decoupled else torch.optim.Adam), params
    if own == "muon":
        check_keys(("optimizer", "params"), params, MUON_PARAMETERS)
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
    if device == "cpu" and not cpp_compiler():
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
            f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer, or a "
            "function that makes one of parameters"
        )
    if isinstance(optimizer, Optimizer) and zero_stage(config):
        _check_zero(type(optimizer), type(optimizer).__name__, config)
    if isinstance(scheduler, LRScheduler) and not isinstance(optimizer, Optimizer):
        raise ConfigError(
            "lr_scheduler belongs to an optimizer that initialize does not get; pass optimizer=... "
            "too, or a function that makes the scheduler of an optimizer"
        )


# --- scheduler ---------------------------------------------------------------------------------

_CHOICES = {
    lr_schedules.WARMUP_TYPE: (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
}


def check_scheduler(config: Mapping[str, Any]) -> None:
    settings = config.get("scheduler")
    if settings is None:
        return
    if scheduler_of(config) is not None:
        return  # ours, and checked there
    name = settings["type"]
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
            f"scheduler.type {name!r} is unknown; "
            f"{_nearest_name(name, {**of_torch, **names, **SCHEDULERS})}"
        )
    if name not in names and (zero_stage(config) or bf16_enabled(config)):
        raise ConfigError(
            f"scheduler.type {name!r} is torch's, which cannot drive DeepSpeed's bf16 and ZeRO "
            f"optimizers; use one of {', '.join([*names, *SCHEDULERS])}"
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
    check_builds("scheduler.params.{}", whole, build, params)


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


# --- parameters --------------------------------------------------------------------------------


def _check_parameters(
    where: str, name: str, cls: Callable[..., Any], given: Mapping[str, Any]
) -> None:
    """Names, kinds and signs by the signature of the class; what it needs is there."""
    parameters = dict(list(inspect.signature(cls).parameters.items())[1:])
    # without what it is made for: parameters, or an optimizer
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
    pair = isinstance(parameter.default, tuple)
    instead = f"a list of {len(parameter.default)} numbers" if pair else ""
    values = value if isinstance(value, list | tuple) else [value]
    if pair and (values is not value or len(value) != len(parameter.default)):
        raise ConfigError(f"{name} must be {instead}, got {value!r}")
    if not values:
        raise ConfigError(f"{name} is an empty list; give a value, or leave it out")
    for one in values:
        check_kind(name, one, _kind_of(parameter), instead)
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


def cpp_compiler() -> str | None:
    """What torch's compiler and DeepSpeed's builders would use on a CPU."""
    return os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
    )
