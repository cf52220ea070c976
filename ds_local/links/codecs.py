"""Activation compression on the links: what a hidden state becomes on its way to the next segment.

Only activations are encoded; gradients, labels and figures travel as they are. A receiver that
learns from its own loss takes the decoded state as its input, so nothing the codec loses comes back
through a gradient; where a gradient does flow (backprop rows), it passes the codec as if that were
the identity, the straight-through estimate. Links inside a stage carry encoded messages too: the
same bits however segments are dealt to ranks.

Encoded messages describe themselves. The tensor `hidden` becomes `hidden|int8|values`,
`hidden|int8|scale`, ... and `hidden|int8|like`, which has the original's dtype and shape behind a
leading 0: no byte on the wire, since shapes are sent once.

A hidden state is seen as N tokens of D features, N x D. "top-k" keeps the largest features of each
token (as in Deep Gradient Compression, Lin et al. 2018, there for gradients); "lowrank" is the
randomized range finder of Halko, Martinsson and Tropp 2011 (algorithm 4.4), without state between
messages, so that a resumed run continues with the same bits. No codec waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_local.config.sections import LinkConfig
from ds_local.links.device import to_device

Parts = dict[str, Tensor]

_MARK = "|"
_POWER_ITERATIONS = 2


class Codec(NamedTuple):
    encode: Callable[[Tensor, LinkConfig], Parts]  # float32 [N, D] -> what travels
    decode: Callable[[Parts, int], Tensor]  # what travelled, D -> [N, D]


def encode(
    message: Mapping[str, Tensor], name: str, link: LinkConfig, hidden: str = "hidden"
) -> dict[str, Tensor]:
    """A message with its hidden state encoded. All else (masks, ids) stays as it is.

    Args:
        message: named tensors.
        name: of the codec, a key of `CODECS`, or "none".
        link: the codecs' options.
        hidden: name of the hidden state, a floating-point tensor.
    """
    if name == "none" or (name == "bf16" and message[hidden].dtype == torch.bfloat16):
        return dict(message)
    encoded: dict[str, Tensor] = {}
    for key, tensor in message.items():
        if key == hidden:
            like = torch.empty((0, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
            with torch.no_grad():
                parts = CODECS[name].encode(
                    tensor.detach().reshape(-1, tensor.shape[-1]).float(), link
                )
            encoded |= {
                _MARK.join((key, name, part)): value
                for part, value in {"like": like, **parts}.items()
            }
        else:
            encoded[key] = tensor
    return encoded


def decode(message: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A message as it was before `encode`, up to what the codec lost; tensors keep their order."""
    whole: dict[str, Tensor] = {}
    encoded: dict[str, tuple[str, Parts]] = {}
    for key, tensor in message.items():
        name, *coded = [key] if "=" in key else key.split(_MARK)
        whole[name] = tensor
        if coded:
            encoded.setdefault(name, (coded[0], {}))[1][coded[1]] = tensor
    with torch.no_grad():
        for name, (codec, parts) in encoded.items():
            like = parts.pop("like")
            hidden_ND = CODECS[codec].decode(parts, like.shape[-1])
            whole[name] = hidden_ND.to(like.dtype).reshape(like.shape[1:]).contiguous()
    return whole


# --- rounding to few bits -------------------------------------------------------------------------


def _quantize(values: Tensor, bits: int) -> Parts:
    """Integers (int8; of 4 bits, two in a uint8) and the bfloat16 scale of each row. A row that is
    not finite becomes NaN.

    The integers belong to the rounded scale, so an element is off by half a scale at most. Rows of
    4 bits have even length.
    """
    levels = 2 ** (bits - 1) - 1
    scale = (values.abs().amax(-1, keepdim=True) / levels).bfloat16()
    steps = values / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    integers = steps.round_().clamp_(-levels, levels).to(torch.int8)
    if bits == 4:
        nibbles = (integers + 8).to(torch.uint8)
        integers = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return {"values": integers, "scale": scale}


def _dequantize(parts: Parts) -> Tensor:
    integers = parts["values"]
    if integers.dtype == torch.uint8:
        integers = torch.stack((integers & 15, integers >> 4), -1).flatten(-2).to(torch.int8) - 8
    return integers.float() * parts["scale"].float()


def _grouped(values_ND: Tensor, size: int | None) -> Tensor:
    """[N, groups, size]: features that share a scale, filled up with zeros; by default all of a
    token's."""
    size = size or values_ND.shape[1]
    size += size % 2  # int4 puts two into a byte
    return F.pad(values_ND, (0, -values_ND.shape[1] % size)).unflatten(1, (-1, size))


def _decode_groups(parts: Parts, num_features: int) -> Tensor:
    return _dequantize(parts).flatten(1)[:, :num_features]


# --- fewer numbers --------------------------------------------------------------------------------


def _encode_topk(hidden_ND: Tensor, link: LinkConfig) -> Parts:
    count = max(1, round(link.keep * hidden_ND.shape[1]))
    chosen_NK = hidden_ND.abs().topk(count, -1).indices.sort(-1).values
    mask_ND = torch.zeros(hidden_ND.shape, dtype=torch.uint8, device=hidden_ND.device).scatter_(
        1, chosen_NK, 1
    )
    return {"mask": _pack_bits(mask_ND), **_quantize(hidden_ND.gather(1, chosen_NK), 8)}


def _decode_topk(parts: Parts, num_features: int) -> Tensor:
    mask_ND = _unpack_bits(parts["mask"])[:, :num_features]
    zeros_ND = torch.zeros(mask_ND.shape, device=mask_ND.device)
    return zeros_ND.masked_scatter(
        mask_ND, _dequantize(parts)
    )  # unlike indexing by a mask it does not wait for the device


@lru_cache(maxsize=4)
def _bits(device: torch.device) -> Tensor:
    return to_device(torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8), device)


def _pack_bits(mask: Tensor) -> Tensor:
    eights = F.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights * _bits(mask.device)).sum(-1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    return (packed.unsqueeze(-1) & _bits(packed.device)).ne(0).flatten(1)


@lru_cache(maxsize=4)
def _start(num_features: int, rank: int, device: torch.device) -> Tensor:
    """The same directions in every message, on every rank."""
    start = torch.randn(num_features, rank, generator=torch.Generator().manual_seed(0))
    return to_device(start, device)


def _encode_lowrank(hidden_ND: Tensor, link: LinkConfig) -> Parts:
    """Coordinates of the tokens in (nearly) the best R-dimensional basis for this message, and the
    basis."""
    num_features = hidden_ND.shape[1]
    rank = min(link.rank or max(1, num_features // 8), *hidden_ND.shape)
    basis_DR = _start(num_features, rank, hidden_ND.device)
    for _ in range(_POWER_ITERATIONS):
        basis_DR = torch.linalg.qr(hidden_ND.T @ (hidden_ND @ basis_DR)).Q
    # along a basis vector the coordinates are of one size, along a token they are not
    return {"basis": basis_DR.bfloat16(), **_quantize((hidden_ND @ basis_DR).T, 8)}


def _decode_lowrank(parts: Parts, num_features: int) -> Tensor:
    return _dequantize(parts).T @ parts["basis"].float().T


CODECS = {
    "bf16": Codec(
        lambda hidden, _: {"values": hidden.bfloat16()}, lambda parts, _: parts["values"]
    ),
    "int8": Codec(
        lambda hidden, link: _quantize(_grouped(hidden, link.group_size), 8), _decode_groups
    ),
    "int4": Codec(
        lambda hidden, link: _quantize(_grouped(hidden, link.group_size), 4), _decode_groups
    ),
    "topk": Codec(_encode_topk, _decode_topk),
    "lowrank": Codec(_encode_lowrank, _decode_lowrank),
}
