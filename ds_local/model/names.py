"""Names of tensors that hold in every layout: of a layer by its number in the model, of a head by
the number of layers below it.

No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

_HEADS = "heads"


def lasting_name(name: str, segment_parts: Sequence[int]) -> str:
    """The lasting name of a tensor that a stage knows by `name`.

    "3.mlp.c_fc.weight" stays; "heads.1.norm.weight" becomes "heads.after 6.norm.weight" where
    segment 1 ends at layer 6.
    """
    first, _, rest = name.partition(".")
    if first != _HEADS:
        return name
    segment, _, inner = rest.partition(".")
    return f"{head_name(segment_parts[int(segment) + 1])}.{inner}"


def head_name(layers: int) -> str:
    """Lasting name of the head after so many layers."""
    return f"{_HEADS}.after {layers}"


def part_of(name: str) -> str:
    """The layer or head that a tensor with a lasting name is of: "3", "heads.after 6"."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == _HEADS else words[0]


def is_head(name: str) -> bool:
    """Of a head, or of a layer?"""
    return name.startswith(f"{_HEADS}.")
