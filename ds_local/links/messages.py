"""What travels between segments: packed, encoded and unpacked here and nowhere else.

A message is a dict of named tensors. A value that is a tensor goes under its name; any other goes
as its leaves, `hidden.0`, `hidden.1`, ..., and `hidden=FORM`, which has no bytes: names travel
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_local.config.sections import LinkConfig
from ds_local.links import codecs
from ds_local.links.device import to_device
from ds_local.links.trees import (
    TENSOR,
    CannotTravel,
    Tree,
    as_leaves,
    as_tensor,
    text_of,
    tree_spec_of,
)

Slots = list[Tensor | None]  # a gradient, by slot; None: nothing reads the tensor

_NO_BYTES = torch.empty(0, dtype=torch.uint8)


class Arrived(NamedTuple):
    """What came from the segment below."""

    hidden: Tree
    learns: list[bool]  # by slot: is a gradient wanted where it comes from?
    labels: Tree
    weight: float  # of the micro-batch among those of its step; 1 on average
    figures: Tensor


def copied_to(value: Any, device: torch.device) -> Tree:
    """A copy of a value on the device, so that layers may change it in place.

    Raises:
        CannotTravel: see `Tree.of`.
    """

    def copied(tensor: Tensor) -> Tensor:
        there = to_device(tensor, device)
        return tensor.clone() if there is tensor else there

    return Tree.of(value).map(copied)


def pack(name: str, tree: Tree) -> dict[str, Tensor]:
    """A value as named tensors; nothing for None."""
    if tree.spec is None:
        return {}
    if tree.spec == TENSOR:
        return {name: tree.leaves[0]}
    leaves = {f"{name}.{i}": as_tensor(leaf) for i, leaf in enumerate(tree.leaves)}
    return leaves | {f"{name}={text_of(tree.spec)}": _NO_BYTES}


def unpack(name: str, message: Mapping[str, Tensor]) -> Tree:
    """What `pack` was given."""
    if name in message:
        return Tree([message[name]], TENSOR)
    text = next((key for key in message if key.startswith(f"{name}=")), None)
    if text is None:
        return Tree([], None)
    spec = tree_spec_of(text.removeprefix(f"{name}="))
    tensors = [tensor for key, tensor in message.items() if key.startswith(f"{name}.")]
    return Tree(as_leaves(tensors, spec), spec)


def activation_message(
    hidden: Tree,
    labels: Tree,
    figures: Tensor,
    link: LinkConfig,
    segment: int,
    weight: float | None = None,
) -> dict[str, Tensor]:
    """From `segment` to the next.

    Args:
        figures: of the segments so far.
        weight: of the micro-batch, None where all count the same.

    Raises:
        CannotTravel: when a codec does not know which of several tensors is the hidden state.
    """
    message = _encoded(pack("hidden", hidden), hidden, link, segment)
    if hidden.spec != TENSOR:
        message["learns"] = _flags(tuple(slot.requires_grad for slot in hidden.slots))
    if weight is not None:
        message["weight"] = torch.tensor(weight, dtype=torch.float64)
    return message | pack("labels", labels) | {"figures": figures}


def _encoded(
    message: dict[str, Tensor], hidden: Tree, link: LinkConfig, segment: int
) -> dict[str, Tensor]:
    codec = link.codec_above(segment)
    if codec == "none":
        return message
    states = [
        key
        for key, leaf in zip(message, hidden.leaves, strict=False)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if len(states) > 1:
        raise CannotTravel(
            f"{len(states)} floating-point tensors, of which link.codec {codec!r} can compress one "
            "(a mask may be bool)"
        )
    return codecs.encode(message, codec, link, states[0]) if states else message


@lru_cache(maxsize=256)
def _flags(values: tuple[bool, ...]) -> Tensor:
    """On the host; shared, so never changed."""
    return torch.tensor(values, dtype=torch.bool)


def parts_of_activation(message: Mapping[str, Tensor]) -> Arrived:
    """What the segment below sent."""
    decoded = codecs.decode(message)
    learns = decoded["learns"].tolist() if "learns" in decoded else [True]
    weight = decoded["weight"].item() if "weight" in decoded else 1.0
    hidden, labels = unpack("hidden", decoded), unpack("labels", decoded)
    return Arrived(hidden, learns, labels, weight, message["figures"])


def gradient_message(gradients: Slots, slots: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients at `slots`. All of them travel, zeros for those that are not there, so that every
    message of a link looks the same."""
    message = {
        str(i): torch.zeros_like(slot) if gradient is None else gradient
        for i, (gradient, slot) in enumerate(zip(gradients, slots, strict=True))
    }
    return message | {"there": _flags(tuple(gradient is not None for gradient in gradients))}


def parts_of_gradient(message: Mapping[str, Tensor]) -> Slots:
    """The gradients of a message from the segment above."""
    there = message["there"].tolist()
    return [message[str(i)] if present else None for i, present in enumerate(there)]


def combine(weighted: list[tuple[Slots, float]]) -> Slots:
    """The sum of gradients, each times its coefficient."""
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0]
    factors = [factor for _, factor in weighted]
    columns = zip(*(gradients for gradients, _ in weighted), strict=True)
    return [_sum(column, factors) for column in columns]


def _sum(gradients: Sequence[Tensor | None], factors: Sequence[float]) -> Tensor | None:
    given = [g * f for g, f in zip(gradients, factors, strict=True) if g is not None]
    return torch.stack(given).sum(0) if len(given) > 1 else given[0] if given else None
