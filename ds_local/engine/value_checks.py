"""Of what kind a value of a config is, and trying out what will be made of it."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import UnionType
from typing import Any

import torch
from deepspeed.utils import logger

from ds_local.config.files import nearest
from ds_local.errors import ConfigError


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# kind -> (does a value fit?, what to write)
_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: _number(value) and value == int(value), "an integer"),
    float: (_number, "a number"),
    str: (lambda value: isinstance(value, str), "a string"),
    dict: (lambda value: isinstance(value, Mapping), "an object with keys of its own"),
}


def check_keys(path: tuple[str, ...], given: Any, kinds: Mapping[str, Any]) -> None:
    """Every key is known, and its value of the kind that is expected.

    Args:
        path: keys that lead to `given`, from the top.
        kinds: known key -> type or annotation.

    Raises:
        ConfigError: naming key and value.
    """
    where = ".".join(path)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be an object with keys of its own, got {given!r}")
    for key, value in given.items():
        name = f"{where}.{key}" if where else key
        if key not in kinds:
            raise ConfigError(f"{name} is not a key DeepSpeed knows; {nearest(key, list(kinds))}")
        check_kind(name, value, kinds[key])


def check_kind(name: str, value: Any, kind: Any, instead: str = "") -> None:
    """Raises ConfigError when `value` is of another kind than a type or annotation says.

    Args:
        instead: what to write, where the kind alone does not say it.
    """
    wanted = kind
    if typing.get_origin(kind) in (typing.Union, UnionType):
        kinds = [one for one in typing.get_args(kind) if one not in (type(None), torch.Tensor)]
        if value is None and type(None) in typing.get_args(kind):
            return
        wanted = kinds[0] if len(kinds) == 1 else None
    fits, text = _KINDS.get(wanted, (lambda _: True, ""))
    if not fits(value):
        unquoted = "; remove the quotes" if text and _is_quoted(value) else ""
        raise ConfigError(f"{name} must be {instead or text}, got {value!r}{unquoted}")


def _is_quoted(value: Any) -> bool:
    """Is it a number, or true or false, but for its quotes?"""
    if not isinstance(value, str):
        return False
    with suppress(ValueError):
        return bool(float(value) or True)
    return value.lower() in ("true", "false")


def check_builds(
    name: str, whole: str, build: Callable[..., Any], given: Mapping[str, Any]
) -> None:
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
