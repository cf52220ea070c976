"""What some models do to their logits after the readout's product: a factor, a soft cap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

# names of the config's keys; the start check finds a model that does something else
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class LogitRule:
    """Logits of a model from the product of its readout, in the library's order of operations."""

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitRule:
        def first(names: tuple[str, ...]) -> float | None:
            return next((v for name in names if (v := getattr(config, name, None))), None)

        return cls(first(_FACTORS), first(_DIVISORS), first(_CAPS))

    def scaled(self, tensor: Tensor) -> Tensor:
        """Logits before the cap; a hidden state in their place gives the same ones."""
        tensor = tensor if self.factor is None else tensor * self.factor
        return tensor if self.divisor is None else tensor / self.divisor

    def __call__(self, logits: Tensor) -> Tensor:
        logits = self.scaled(logits)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


PLAIN = LogitRule()
