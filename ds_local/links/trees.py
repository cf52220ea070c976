"""What a layer passes on: tensors, alone or in tuples, lists, dicts and named tuples.

A `Tree` is such a value taken apart into its leaves and its spec. Leaves are tensors and numbers;
all else (containers, None, strings) is in the spec, which has a text, so that it can travel.

A *slot* is a tensor that can have a gradient, a floating-point or complex one. Gradients are lists
with one entry per slot, in the order of the value, None where there is no gradient.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

TreeSpec = Any  # TENSOR, _NUMBER, None, ("text", string), (kind, names, specs of the parts)

TENSOR, _NUMBER = "tensor", "number"
_NUMBERS = {
    bool: torch.bool,
    int: torch.int64,
    float: torch.float64,
    complex: torch.complex128,
}
_SEQUENCES: dict[str, type] = {"tuple": tuple, "list": list, "Size": torch.Size}
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict}
_KINDS = {kind: name for name, kind in (_SEQUENCES | _MAPPINGS).items()}


class CannotTravel(Exception):
    """Says what it is that cannot travel."""


class Tree:
    """A value taken apart."""

    __slots__ = ("leaves", "slots", "spec")

    def __init__(self, leaves: list[Any], spec: TreeSpec) -> None:
        self.leaves, self.spec = leaves, spec
        self.slots: list[Tensor] = [leaf for leaf in leaves if _is_slot(leaf)]

    @classmethod
    def of(cls, value: Any, strict: bool = True) -> Tree:
        """Take a value apart.

        Args:
            strict: refuse what cannot travel. Otherwise it is a leaf as it is.

        Raises:
            CannotTravel: when there is something else in it than tensors, numbers, strings and
                None, or a container of a class of its own.
        """
        if type(value) is Tensor and (not strict or _is_plain(value)):
            return cls([value], TENSOR)
        leaves: list[Any] = []
        spec = _take_apart(value, leaves, strict)
        return cls(leaves, spec)

    def value(self) -> Any:
        """The value, put together again."""
        return (
            self.leaves[0] if self.spec == TENSOR else _put_together(self.spec, iter(self.leaves))
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Tree:
        """The tree with `function` applied to every tensor."""
        leaves = [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return Tree(leaves, self.spec)

    def with_slots(self, tensors: Sequence[Tensor]) -> Tree:
        """The tree with other tensors in its slots."""
        new = iter(tensors)
        return Tree([next(new) if _is_slot(leaf) else leaf for leaf in self.leaves], self.spec)


def _is_slot(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor in a value, whatever else is in it."""
    return Tree.of(value, strict=False).map(function).value()


def _take_apart(value: Any, leaves: list[Any], strict: bool) -> TreeSpec:
    kind = type(value)
    if isinstance(value, Tensor) and (not strict or _is_plain(value)):
        leaves.append(value)
        return TENSOR
    if value is None:
        return None
    if kind is str:
        return "text", value
    if kind in _NUMBERS and (kind is not int or -(2**63) <= value < 2**63):
        leaves.append(value)
        return _NUMBER
    if kind in _KINDS:
        return _container(_KINDS[kind], value, leaves, strict)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        names = f"{kind.__module__}:{kind.__qualname__}", *kind._fields
        _named_tuples[names] = kind
        return "named", names, tuple(_take_apart(part, leaves, strict) for part in value)
    if strict:
        raise CannotTravel(_description(value))
    leaves.append(value)
    return _NUMBER


def _container(name: str, value: Any, leaves: list[Any], strict: bool) -> TreeSpec:
    if name in _SEQUENCES:
        return name, None, tuple(_take_apart(part, leaves, strict) for part in value)
    if strict and any(type(key) not in (str, int) for key in value):
        odd = next(key for key in value if type(key) not in (str, int))
        raise CannotTravel(f"a {name} with the key {odd!r}")
    return name, tuple(value), tuple(_take_apart(part, leaves, strict) for part in value.values())


def _description(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, Tensor):
        return f"a tensor that is not dense ({value.layout})"
    if type(value) is int:
        return f"the number {value}, which takes more than 64 bits"
    return f"a {name}"


def _put_together(spec: TreeSpec, leaves: Iterator[Any]) -> Any:
    if spec in (TENSOR, _NUMBER):
        return next(leaves)
    if spec is None:
        return None
    if spec[0] == "text":
        return spec[1]
    kind, names, specs = spec
    parts = [_put_together(part, leaves) for part in specs]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](parts)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](zip(names, parts, strict=True))
    return _named_tuple(names)._make(parts)


_named_tuples: dict[tuple[str, ...], Any] = {}  # those that have passed by


def _named_tuple(names: tuple[str, ...]) -> Any:
    """The class of a named tuple; one of the same name and fields where this process has no such
    class (it was made inside a function)."""
    if names not in _named_tuples:
        module, _, path = names[0].partition(":")
        found: Any = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        if getattr(found, "_fields", None) != names[1:]:
            make: Any = namedtuple
            found = make(path.rpartition(".")[2], names[1:])
        _named_tuples[names] = found
    return _named_tuples[names]


# --- what travels -------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def text_of(spec: TreeSpec) -> str:
    return json.dumps(spec)


@cache
def tree_spec_of(text: str) -> TreeSpec:
    def frozen(part: Any) -> Any:
        return tuple(map(frozen, part)) if isinstance(part, list) else part

    return frozen(json.loads(text))


def as_tensor(leaf: Any) -> Tensor:
    """A leaf as it travels: a number becomes a tensor on the host."""
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=_NUMBERS[type(leaf)])


def as_leaves(tensors: Sequence[Tensor], spec: TreeSpec) -> list[Any]:
    """The leaves of a spec from what travelled."""
    kinds = iter(_leaf_kinds(spec))
    return [tensor if next(kinds) == TENSOR else tensor.item() for tensor in tensors]


@lru_cache(maxsize=256)
def _leaf_kinds(spec: TreeSpec) -> tuple[str, ...]:
    if spec in (TENSOR, _NUMBER):
        return (spec,)
    if spec is None or spec[0] == "text":
        return ()
    return tuple(kind for part in spec[2] for kind in _leaf_kinds(part))
