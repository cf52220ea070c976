"""A message as bytes: where its tensors lie in the buffer that travels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_local.errors import TransportError

SPEC_BYTES = 16384  # of the first message, which says what all others look like
HEADER = 4  # int64 entries: code, step, micro-batch, flags
_ALIGN = 16
_REASON_BYTES = 1024

Message = Mapping[str, Tensor]


class Tag(NamedTuple):
    """What a message belongs to."""

    step: int
    micro_batch: int
    last_step: bool = False  # the sender will stop after this step
    data_ends: bool = False  # there is none for another step

    def __str__(self) -> str:
        return f"step {self.step}, micro-batch {self.micro_batch}"


class Spec(NamedTuple):
    """What a tensor of a message looks like."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool  # it did not lie on the sender's device, and does not go to the receiver's

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def specs_of(tensors: Message, device: torch.device) -> list[Spec]:
    return [
        Spec(name, tuple(t.shape), t.dtype, t.device.type != device.type)
        for name, t in tensors.items()
    ]


class Packed:
    """Where each tensor of a message lies in its byte buffer, behind `reserved` bytes; the buffer
    has `least` bytes."""

    def __init__(self, specs: Sequence[Spec], reserved: int = 0, least: int = 0) -> None:
        self.specs = list(specs)
        self.offsets = []
        position = reserved
        for spec in specs:
            position = -(-position // _ALIGN) * _ALIGN
            self.offsets.append(position)
            position += spec.num_bytes
        self.num_bytes = max(position, least)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            spec.name: buffer[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for offset, spec in zip(self.offsets, self.specs, strict=True)
        }


class Form:
    """What every message of a link looks like: the buffer that goes through the host, and the one
    that does not."""

    def __init__(self, specs: Sequence[Spec], direct: bool) -> None:
        self.specs = list(specs)
        room = (
            _REASON_BYTES if direct else 0
        )  # other messages have room enough for why a run failed
        self.staged = Packed(
            [spec for spec in specs if spec.on_host or not direct], HEADER * 8, room
        )
        self.direct = Packed([spec for spec in specs if direct and not spec.on_host])
        self.num_bytes = self.staged.num_bytes + self.direct.num_bytes

    @classmethod
    def parse(cls, described: list[tuple[str, list[int], str, bool]], direct: bool) -> Form:
        return cls(
            [
                Spec(name, tuple(shape), getattr(torch, dtype), host)
                for name, shape, dtype, host in described
            ],
            direct,
        )


def described(specs: Sequence[Spec]) -> list[tuple[str, list[int], str, bool]]:
    return [
        (name, list(shape), str(dtype).removeprefix("torch."), on_host)
        for name, shape, dtype, on_host in specs
    ]


def difference(old: Sequence[Spec], new: Sequence[Spec]) -> tuple[str, str]:
    """What is only in one of two descriptions of a message, in words."""

    def words(specs: Iterable[Spec]) -> str:
        kinds = described([spec for spec in specs if spec.num_bytes or "=" in spec.name])
        return ", ".join(f"{name} {dtype} {shape}" for name, shape, dtype, _ in kinds) or "less"

    return words(s for s in old if s not in new), words(s for s in new if s not in old)


class Buffer:
    """The bytes of a message, and its header and tensors in them."""

    def __init__(self, packed: Packed, data: Tensor) -> None:
        self.data = data
        self.header = data[: HEADER * 8].view(torch.int64).numpy()
        self.tensors = packed.views(data)


def spec_buffer(spec: dict[str, Any]) -> Tensor:
    data = json.dumps(spec).encode()
    if len(data) > SPEC_BYTES:
        raise TransportError(
            f"the shapes of a message take {len(data)} bytes to describe, at most {SPEC_BYTES} "
            "fit; send fewer tensors"
        )
    buffer = torch.zeros(SPEC_BYTES, dtype=torch.uint8)
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return buffer


def text_of(buffer: Tensor) -> str:
    return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")
