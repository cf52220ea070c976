"""What layers keep of all they have seen, such as running statistics: one step that is not finite
must not stay in it for good, as it would in an average, and replicas must have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ds_local.links.device import to_device


class Replicas(NamedTuple):
    """Of a stage; each method is a collective call of theirs."""

    group: Any
    first: int  # global rank of the first one
    device: torch.device

    def on_any(self, flags: Sequence[bool]) -> list[bool]:
        """Flags that are set on any of them."""
        numbers = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return [number > 0 for number in numbers.tolist()]

    @torch.no_grad()
    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """All get the bits of the first one's."""
        if not tensors:
            return
        parts = [to_device(t.detach(), self.device).reshape(-1).view(torch.uint8) for t in tensors]
        flat = torch.cat(parts)
        dist.broadcast(flat, self.first, group=self.group)
        for tensor, part in zip(tensors, flat.split([len(p) for p in parts]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


class KeptBuffers:
    """The buffers of a stage that steps change, as they were after the last step.

    Args:
        module: of this stage.
        replicas: of this stage, which get the first one's buffers, as DeepSpeed does it with the
            weights; None: there is one. A collective call of theirs.
    """

    def __init__(self, module: nn.Module, replicas: Replicas | None = None) -> None:
        self._module, self._replicas = module, replicas
        self._kept: dict[str, Tensor] = {}
        self._watched: dict[str, Tensor] = {}  # before the step that shows which of them change
        if replicas is not None:
            replicas.take_from_first(list(module.buffers()))
        self.watch()

    @torch.no_grad()
    def watch(self) -> None:
        """Which buffers change is seen in the next step, the first of its kind."""
        self._watched = {
            name: buffer.detach().clone()
            for name, buffer in self._module.named_buffers()
            if name not in self._kept
        }

    @torch.no_grad()
    def keep(self) -> None:
        """They are what they should be."""
        if not self._kept and not self._watched:
            return  # most models: no walk through all modules in each step
        found = dict(self._module.named_buffers())
        for names in (self._kept, self._watched):
            names.update({name: found[name].detach().clone() for name in names if name in found})

    @torch.no_grad()
    def mend(self, shares: bool = True) -> None:
        """After a step: those that are not finite any more become what they were. Nobody waits for
        the device, but in the first step of a kind.

        Args:
            shares: replicas get the same; a collective call of theirs where buffers change.
        """
        self._find()
        if not self._kept:
            return
        found = dict(self._module.named_buffers())
        pairs = [(found[name], old) for name, old in self._kept.items() if name in found]
        pairs = [(buffer, old) for buffer, old in pairs if buffer.shape == old.shape]
        buffers = [buffer for buffer, _ in pairs]
        # micro-batches that have run ahead may have kept one for their backward pass
        with torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):
            for buffer, old in pairs:
                if buffer.is_floating_point():
                    spoilt = ~buffer.isfinite().all() & old.isfinite().all()
                    buffer.copy_(torch.where(spoilt, old, buffer))
            if shares and self._replicas is not None:
                self._replicas.take_from_first(buffers)
        self.keep()

    def _find(self) -> None:
        if not self._watched:
            return
        found = dict(self._module.named_buffers())
        changed = [
            name in found and found[name].shape == old.shape and not torch.equal(found[name], old)
            for name, old in self._watched.items()
        ]
        if self._replicas is not None:
            changed = self._replicas.on_any(changed)
        pairs = zip(self._watched.items(), changed, strict=True)
        self._kept |= {name: old for (name, old), one in pairs if one}
        self._watched = {}
