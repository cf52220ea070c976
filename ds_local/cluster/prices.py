"""What a candidate costs, and what its tokens are worth. Times in seconds, sizes in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ds_local.cluster.candidates import Candidate
from ds_local.cluster.learning import BACKPROPS, Learning


@dataclass
class Price:
    """What a layout costs. `step_seconds` is a lower bound until `simulated`."""

    candidate: Candidate
    step_seconds: float
    tokens: int  # in a step
    memory: float  # on the fullest device
    parts: dict[str, float]  # seconds of a step by cause, on the busiest stage
    bytes_per_edge: float  # over one link between two stages, in a step, the fuller direction
    bytes_reduced: float  # sent by one device to average gradients, in a step
    idle_share: float = math.nan
    simulated: bool = False
    learning: Learning = BACKPROPS  # what its tokens are worth

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def device_tokens_per_second(self) -> float:
        return self.tokens_per_second / (self.candidate.stages * self.candidate.replicas)

    @property
    def cost(self) -> float:
        """Seconds of a step, counted as often as its tokens are needed."""
        return self.step_seconds * self.learning.times

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The lowest is the best; what differs by less than is printed goes by memory."""
        return self.learning.tokens is None, float(f"{self.cost:.3g}"), self.memory

    @property
    def loss(self) -> str:
        """What costs it most beside the model's own work."""
        waiting = self.step_seconds - sum(self.parts.values())
        causes = {
            name: seconds for name, seconds in self.parts.items() if name != "the model's own work"
        }
        causes |= {"waiting for other stages or links": waiting}
        cause, seconds = max(causes.items(), key=lambda item: item[1])
        return (
            f"{seconds / self.step_seconds:.0%} of the step is {cause}"
            if seconds > 0.005 * self.step_seconds
            else "nothing much"
        )


def over_the_run(candidate: Candidate, prices: Sequence[tuple[float, Price]]) -> Price:
    """What a run costs of which each part has a price: means over its steps, the most of memory.

    Args:
        prices: (share of the steps, price of that part).
    """
    (_, first), *_ = prices

    def mean(figure: Callable[[Price], float]) -> float:
        return sum(share * figure(price) for share, price in prices)

    def mean_part(name: str) -> float:
        return mean(lambda price: price.parts[name])

    seconds = mean(lambda price: price.step_seconds)
    return replace(
        first,
        candidate=candidate,
        step_seconds=seconds,
        memory=max(price.memory for _, price in prices),
        parts={name: mean_part(name) for name in first.parts},
        bytes_per_edge=mean(lambda price: price.bytes_per_edge),
        bytes_reduced=mean(lambda price: price.bytes_reduced),
        idle_share=mean(lambda price: price.idle_share * price.step_seconds) / seconds,
    )
