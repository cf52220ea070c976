"""A message as bytes: where its tensors lie in the buffer that travels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_local.errors import TransportError

SPEC_BYTES = 16384  # most of a text that says what messages look like
HEADER = 4  # int64 entries: code, step, micro-batch, flags and above them the number of the form
_ALIGN = 16

Message = Mapping[str, Tensor]


class Tag(NamedTuple):
    """What a message belongs to."""

    step: int
    micro_batch: int
    run_ends: bool = False  # the sender will stop after this step
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
    """Where each tensor of a message lies in its byte buffer, behind `reserved` bytes."""

    def __init__(self, specs: Sequence[Spec], reserved: int = 0) -> None:
        self.specs = list(specs)
        self.offsets = []
        position = reserved
        for spec in specs:
            position = -(-position // _ALIGN) * _ALIGN
            self.offsets.append(position)
            position += spec.num_bytes
        self.num_bytes = position

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            spec.name: buffer[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for offset, spec in zip(self.offsets, self.specs, strict=True)
        }


class Form:
    """What some messages of a link look like: the buffer that goes through the host, and the one
    that does not.

    Args:
        number: of the link's forms, in the order in which they come.
    """

    def __init__(self, specs: Sequence[Spec], direct: bool, number: int = 0) -> None:
        self.specs, self.number = list(specs), number
        self.staged = Packed([spec for spec in specs if spec.on_host or not direct], HEADER * 8)
        self.direct = Packed([spec for spec in specs if direct and not spec.on_host])
        self.num_bytes = self.staged.num_bytes + self.direct.num_bytes

    @classmethod
    def parse(
        cls, described: list[tuple[str, list[int], str, bool]], direct: bool, number: int = 0
    ) -> Form:
        return cls(
            [
                Spec(name, tuple(shape), getattr(torch, dtype), host)
                for name, shape, dtype, host in described
            ],
            direct,
            number,
        )


def described(specs: Sequence[Spec]) -> list[tuple[str, list[int], str, bool]]:
    return [
        (name, list(shape), str(dtype).removeprefix("torch."), on_host)
        for name, shape, dtype, on_host in specs
    ]


class Buffer:
    """The bytes of a message, and its header and tensors in them.

    Args:
        whole: room for this message, perhaps for larger ones too.
    """

    def __init__(self, packed: Packed, whole: Tensor) -> None:
        self.packed, self.whole = packed, whole
        self.data = whole[: packed.num_bytes]
        self.header = header_of(whole)
        self.tensors = packed.views(whole)


def header_of(data: Tensor) -> Any:
    """Four integers: code, step, micro-batch, flags."""
    return data[: HEADER * 8].view(torch.int64).numpy()


def text_buffer(code: int, said: Mapping[str, Any]) -> Tensor:
    """A message without tensors: its code, the length of its text and the text.

    Raises:
        TransportError: when it is too long.
    """
    text = json.dumps(said).encode()
    if len(text) > SPEC_BYTES:
        raise TransportError(
            f"the shapes of a message take {len(text)} bytes to describe, at most {SPEC_BYTES} "
            "fit; send fewer tensors"
        )
    buffer = torch.zeros(HEADER * 8 + len(text), dtype=torch.uint8)
    header_of(buffer)[:2] = code, len(text)
    buffer[HEADER * 8 :] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return buffer


def said_in(data: Tensor) -> dict[str, Any]:
    """What `text_buffer` was given."""
    length = header_of(data)[1]
    return json.loads(bytes(data[HEADER * 8 :][:length].tolist()))
