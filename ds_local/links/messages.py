"""What travels between segments: packed, encoded and unpacked here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_local.config.schema import LinkConfig
from ds_local.errors import ConfigError
from ds_local.links import codecs


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels) of a micro-batch: a pair, a dict of a Hugging Face data collator, or token
    ids that are both."""
    if isinstance(batch, Mapping):
        return batch["input_ids"], batch.get("labels", batch["input_ids"])
    if isinstance(batch, Tensor):
        return batch, batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return tuple(batch)
    raise ConfigError(
        f"a micro-batch must be (inputs, labels), a dict with input_ids, or token ids; got {type(batch).__name__}"
    )


def map_tensors(value: Any, function: Any) -> Any:
    """Apply `function` to a tensor or to each of a tuple of tensors."""
    return (
        function(value)
        if isinstance(value, Tensor)
        else tuple(function(tensor) for tensor in value)
    )


def to_device(value: Any, device: torch.device) -> Any:
    """On a GPU by way of pinned memory, so that the host need not wait for what the device still
    computes."""
    if value is None:
        return None
    if device.type != "cuda":
        return map_tensors(value, lambda t: t.to(device))
    return map_tensors(
        value,
        lambda t: (
            t.pin_memory().to(device, non_blocking=True) if t.device.type == "cpu" else t.to(device)
        ),
    )


def floating(value: Any) -> list[Tensor]:
    return [t for t in ([value] if isinstance(value, Tensor) else value) if t.is_floating_point()]


def narrow(labels: Any) -> Any:
    """Token ids take 4 bytes on a link, not 8."""
    return (
        None
        if labels is None
        else map_tensors(labels, lambda t: t.int() if t.dtype == torch.int64 else t)
    )


def widen(labels: Any) -> Any:
    return (
        None
        if labels is None
        else map_tensors(labels, lambda t: t.long() if t.dtype == torch.int32 else t)
    )


def combine(weighted: list[tuple[list[Tensor], float]]) -> list[Tensor]:
    """The sum of gradients, each times its coefficient."""
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0]
    columns = zip(
        *(
            [gradient * coefficient for gradient in gradients]
            for gradients, coefficient in weighted
        ),
        strict=True,
    )
    return [torch.stack(column).sum(0) if len(column) > 1 else column[0] for column in columns]


def pack(name: str, value: Tensor | Sequence[Tensor] | None) -> dict[str, Tensor]:
    if value is None:
        return {}
    return (
        {name: value}
        if isinstance(value, Tensor)
        else {f"{name}.{i}": t for i, t in enumerate(value)}
    )


def unpack(name: str, message: Mapping[str, Tensor]) -> Any:
    """What `pack` was given, a sequence as a tuple."""
    if name in message:
        return message[name]
    several = tuple(tensor for key, tensor in message.items() if key.startswith(f"{name}."))
    return several or None


def activation_message(
    hidden: Any, labels: Any, figures: Tensor, link: LinkConfig, segment: int
) -> dict[str, Tensor]:
    """From `segment` to the next: hidden state, labels, and the figures of the segments so far."""
    encoded = codecs.encode(pack("hidden", hidden), link.codec_above(segment), link)
    return encoded | pack("labels", narrow(labels)) | {"figures": figures}


def parts_of_activation(message: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """(hidden, labels) of a message from the segment below."""
    message = codecs.decode(message)
    return unpack("hidden", message), widen(unpack("labels", message))
