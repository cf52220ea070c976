"""Reading ds_config.json: the whole file, and the checked "local_parallel" section in it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_local.config.schema import SECTION, LocalParallelConfig
from ds_local.errors import ConfigError


def load_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The whole DeepSpeed config as a dict, from a file or a mapping.

    Raises:
        ConfigError: when it cannot be read, is no JSON object, or has a key twice.
    """
    if isinstance(source, Mapping):
        return dict(source)

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        double = sorted({key for key in keys if keys.count(key) > 1})
        if double:
            raise ConfigError(f"{source} has the key {double[0]!r} twice; keep one")
        return dict(pairs)

    try:
        config = json.loads(Path(source).read_text(), object_pairs_hook=no_doubles)
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed config {source}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the DeepSpeed config {source} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"the DeepSpeed config {source} must be a JSON object, got {type(config).__name__}"
        )
    return config


def local_parallel(config: Mapping[str, Any]) -> LocalParallelConfig:
    """The checked "local_parallel" section of a DeepSpeed config; all defaults when there is none.

    Raises:
        ConfigError: naming the key, and the nearest valid key when it is unknown.
    """
    try:
        return LocalParallelConfig.model_validate(config.get(SECTION, {}))
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(e) for e in error.errors())) from None


def _sentence(error: Any) -> str:
    path = ".".join([SECTION, *map(str, error["loc"])])
    if error["type"] != "extra_forbidden":
        detail = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
        given = "" if isinstance(error["input"], Mapping) else f", got {error['input']!r}"
        return f"{path}: {detail}{given}"
    *parents, key = error["loc"]
    known = _fields_at(LocalParallelConfig, parents)
    return f"{path} is not a known key; {_nearest(str(key), known)}"


def _fields_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = next((m for m in models_in(model.model_fields[part].annotation)), model)
    return list(model.model_fields)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in models_in(inner)]


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(sorted(known))}"
