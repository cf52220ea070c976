"""Weights that a step does not touch, under optimizers that step all of a stage at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.engine.deepspeed_seam import shares_of


@contextmanager
def at_rest(optimizer: Any, states: Any, weights: Collection[nn.Parameter]) -> Iterator[None]:
    """Around an optimizer step: these weights, their masters and moments stay as they are.
    DeepSpeed fills in zeros for gradients that are not there, so they would decay and drift on.

    Args:
        optimizer: DeepSpeed's.
        states: the state of the one that it wraps, by tensor.
    """
    resting = {id(weight) for weight in weights}
    kept: list[tuple[Tensor, Tensor]] = [(w.data, w.detach().clone()) for w in weights]
    for share in (s for group in shares_of(optimizer) for s in group if id(s.parameter) in resting):
        own = share.holder
        flats = [own, *(t for t in states.get(own, {}).values() if isinstance(t, Tensor))]
        places = [
            flat.detach().narrow(0, share.offset, share.length)
            for flat in flats
            if flat.shape == own.shape
        ]
        kept += [(place, place.clone()) for place in places]
    yield
    with torch.no_grad():
        for place, before in kept:
            place.copy_(before)
