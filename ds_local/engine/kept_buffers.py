"""What layers keep of all they have seen, such as running statistics: one step that is not finite
must not stay in it for good, as it would in an average."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KeptBuffers:
    """The buffers of a stage that steps change, as they were after the last step.

    Args:
        module: of this stage.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept: dict[str, Tensor] = {}
        self._is_first = True  # which buffers change is seen in the first step
        self.keep()

    def _buffers(self) -> dict[str, Tensor]:
        if not self._is_first and not self._kept:
            return {}  # most models: no walk through all modules in each step
        found = dict(self._module.named_buffers())
        return found if self._is_first else {n: b for n, b in found.items() if n in self._kept}

    @torch.no_grad()
    def keep(self) -> None:
        """They are what they should be."""
        floating = {n: b for n, b in self._buffers().items() if b.is_floating_point()}
        self._kept = {name: buffer.detach().clone() for name, buffer in floating.items()}

    @torch.no_grad()
    def mend(self) -> None:
        """After a step: those that are not finite any more become what they were. Nobody waits for
        the device, but in the first step."""
        for name, buffer in self._buffers().items():
            if name not in self._kept:
                continue
            before = self._kept[name]
            same = self._is_first and torch.equal(buffer, before)
            if same or buffer.shape != before.shape:
                del self._kept[name]
                continue
            spoilt = ~buffer.isfinite().all() & before.isfinite().all()
            buffer.copy_(torch.where(spoilt, before, buffer))
        self._is_first = False
        self.keep()
