"""Full replicas that average their weights now and then, with an outer Nesterov step (DiLoCo,
Douillard et al. 2023, arXiv 2311.08105)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_local.config.sections import ReplicasConfig
from ds_local.replicas.engine import Engine
from ds_local.replicas.sync import Apart


class Periodic(Apart):
    """Full replicas whose weights are averaged every `every` steps; the optimizer's moments stay
    with each replica.

    With an outer step, the difference between the last common weights and the mean is taken for a
    gradient, and a Nesterov step of `outer_lr` and `outer_momentum` from the last common weights
    gives the next ones. It costs two more copies of the weights; plain averaging (rate 1, no
    momentum) costs none.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.has_outer_step = (self.settings.outer_lr, self.settings.outer_momentum) != (1.0, 0.0)
        self.common: dict[str, Tensor] = {}
        self.velocity: dict[str, Tensor] = {}
        self.start_from_whole()

    def meet(self) -> None:
        rate, momentum = self.settings.outer_lr, self.settings.outer_momentum
        for part in self.parts:
            slots = self.slots(part, moments=False)
            self.share(slots)
            for name, parameter, *_ in slots:
                if name in self.common:
                    common, velocity = self.common[name], self.velocity[name]
                    gradient = common - parameter.data
                    velocity.mul_(momentum).add_(gradient)
                    common.sub_(gradient.add_(velocity, alpha=momentum), alpha=rate)
                    parameter.data.copy_(common)

    def start_from_whole(self) -> None:
        learning = {
            n: p
            for part in self.parts.values()
            for n, p in part.items()
            if p.requires_grad and self.has_outer_step
        }
        self.common = {name: parameter.detach().clone() for name, parameter in learning.items()}
        self.velocity = {name: torch.zeros_like(parameter) for name, parameter in learning.items()}

    def state_depends_on(self, settings: ReplicasConfig, seed: int) -> dict[str, Any]:
        return {"an outer step": (settings.outer_lr, settings.outer_momentum) != (1.0, 0.0)}

    def extra_state(self) -> dict[str, dict[str, Tensor]]:
        return {"common": self.common, "velocity": self.velocity}
