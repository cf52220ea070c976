"""Reading ds_config.json: the whole file, and the checked "local_parallel" section in it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_local.config import shipped
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError


def load_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The whole DeepSpeed config as a dict, from a file, the name of a shipped one, or a mapping.

    Raises:
        ConfigError: when it cannot be read, is no JSON object, or has a key twice.
    """
    if isinstance(source, Mapping):
        return dict(source)
    try:
        config = read_json(shipped.find(source))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed config {source}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the DeepSpeed config {source} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"the DeepSpeed config {source} must be a JSON object, got {type(config).__name__}"
        )
    return config


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: when an object in it has a key twice.
        OSError, ValueError, RecursionError: when it cannot be read.
    """

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        double = sorted({key for key in keys if keys.count(key) > 1})
        if double:
            raise ConfigError(f"{path} has the key {double[0]!r} twice; keep one")
        return dict(pairs)

    return json.loads(path.read_text(), object_pairs_hook=no_doubles)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is neither object nor list, with the keys and numbers that lead to it."""
    if isinstance(value, Mapping):
        inner: Any = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    else:
        yield path, value
        return
    for key, one in inner:
        yield from leaves(one, (*path, str(key)))


def check_finite(config: Mapping[str, Any], where: str = "") -> None:
    """JSON as Python reads it may hold NaN and Infinity.

    Raises:
        ConfigError: naming the key.
    """
    for path, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            name = (f"{where}: " if where else "") + ".".join(path)
            raise ConfigError(f"{name} is {json.dumps(value)}; write a finite number, or remove it")


def local_parallel(config: Mapping[str, Any]) -> LocalParallelConfig:
    """The checked "local_parallel" section of a DeepSpeed config; all defaults when there is none.

    Raises:
        ConfigError: naming the key, and the nearest valid key when it is unknown.
    """
    try:
        return LocalParallelConfig.model_validate(config.get(SECTION, {}))
    except ValidationError as error:
        raise ConfigError("; ".join(_sentences(error.errors()))) from None


def _sentences(errors: Sequence[Any]) -> Iterator[str]:
    """One for each key; a value that fits none of several kinds has an error of each."""
    by_path: dict[tuple[str | int, ...], list[Any]] = {}
    for error in errors:
        path = _keys_of(error["loc"], error["type"] == "extra_forbidden")
        by_path.setdefault(path, []).append(error)
    for path, same in by_path.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in by_path):
            continue  # what is wrong inside says more
        yield _sentence(".".join([SECTION, *map(str, path)]), path, same)


def _sentence(name: str, path: tuple[str | int, ...], errors: Sequence[Any]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        *parents, key = path
        known = _fields_at(LocalParallelConfig, parents)
        return f"{name} is not a known key; {nearest(str(key), known)}"
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}"
    return must_be(name, errors)


def must_be(name: str, errors: Sequence[Any]) -> str:
    """A sentence about a value that pydantic refuses, from its errors on it."""
    wanted = [one["msg"].removeprefix("Input should be ") for one in errors]
    wanted = [_KINDS.get(one.split(" or ")[0], one) for one in dict.fromkeys(wanted)]
    given = json.dumps(errors[0]["input"], default=str)
    return f"{name} must be {' or '.join(wanted)}, got {given}"


_KINDS = {
    "a valid dictionary": "an object with keys of its own",
    "a valid tuple": "a list",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "a string",
    "a valid boolean": "true or false",
}


def _keys_of(location: Sequence[str | int], unknown: bool) -> tuple[str | int, ...]:
    """The keys and list positions of an error's place, without the kinds of value tried there.

    Args:
        unknown: the last key is one that is not known.
    """
    keys: list[str | int] = []
    fields: dict[str, Any] = dict(LocalParallelConfig.model_fields)
    for number, part in enumerate(location, 1):
        if part in fields:
            model = next(iter(models_in(fields[str(part)].annotation)), None)
            fields = dict(model.model_fields) if model else {}
        elif not (isinstance(part, int) or (unknown and number == len(location))):
            continue
        keys.append(part)
    return tuple(keys)


def _fields_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = next((m for m in models_in(model.model_fields[part].annotation)), model)
    return list(model.model_fields)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in models_in(inner)]


def nearest(key: str, known: list[str]) -> str:
    """The end of a sentence about an unknown key: the known one it resembles, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(sorted(known))}"
