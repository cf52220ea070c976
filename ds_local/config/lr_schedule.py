"""Learning-rate schedules that `ds_config.json` can name and DeepSpeed lacks: warm-up, stable,
decay.

    "scheduler": {"type": "WSD", "params": {"total_num_steps": 10000, "warmup_num_steps": 100}}

The rate rises in a line to the optimizer's, stays there, and falls in a line in the last steps.
No torch, no DeepSpeed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ds_local.errors import ConfigError


class WarmupStableDecayLR:
    """Sets the learning rate of every parameter group; `step` is called after each optimizer step.

    Args:
        optimizer: anything with `param_groups`; the rates it has now are those of the stable part.
        total_num_steps: optimizer steps of the whole run.
        warmup_num_steps: steps until the full rate; the first one has 1 / warmup_num_steps of it.
        decay_num_steps: steps at the end in which the rate falls (default: a fifth of all).
        decay_min_ratio: share of the rate at which the decay ends, one step after the last.
        last_batch_iteration: steps already taken, less one.

    Raises:
        ConfigError: when the parts do not fit in the whole.
    """

    def __init__(
        self, optimizer: Any, total_num_steps: int, warmup_num_steps: int = 0,
        decay_num_steps: int | None = None, decay_min_ratio: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:  # fmt: skip
        self.total = _number("total_num_steps", total_num_steps)
        self.warm_up = _number("warmup_num_steps", warmup_num_steps)
        self.min_ratio = _number("decay_min_ratio", decay_min_ratio)
        fifth = round(self.total / 5)
        self.decay = (
            fifth if decay_num_steps is None else _number("decay_num_steps", decay_num_steps)
        )
        if min(self.warm_up, self.decay) < 0 or self.warm_up + self.decay > self.total:
            raise ConfigError(
                f"scheduler.params: warmup_num_steps {self.warm_up} and decay_num_steps "
                f"{self.decay} must not be negative, nor longer together than total_num_steps "
                f"{self.total}; change one of them"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(
                f"scheduler.params.decay_min_ratio must be between 0 and 1, got {self.min_ratio}"
            )
        self.optimizer = optimizer
        self.full_rates = [group["lr"] for group in optimizer.param_groups]
        self.last_batch_iteration = last_batch_iteration
        self._set_rates()

    def ratio(self, step: int) -> float:
        """Share of the full rate in optimizer step `step`, counted from 0."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        left = max(0, self.total - step)
        if left >= self.decay:
            return 1.0
        return self.min_ratio + (1 - self.min_ratio) * left / self.decay

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float]:
        """The rates of the coming step, one a parameter group."""
        return [rate * self.ratio(self.last_batch_iteration + 1) for rate in self.full_rates]

    get_last_lr = get_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """An optimizer step was taken."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = (
            following if last_batch_iteration is None else last_batch_iteration
        )
        self._set_rates()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]
        self._set_rates()


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"scheduler.params.{name} must be a number, got {value!r}; change it")
    return value


SCHEDULERS = dict.fromkeys(("WarmupStableDecayLR", "WSD"), WarmupStableDecayLR)  # two names of one


class _NoOptimizer:
    param_groups: tuple[Any, ...] = ()


def scheduler_of(config: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """Optimizer -> the scheduler that `ds_config.json` names; None where it is DeepSpeed's own.

    Raises:
        ConfigError: for parameters that it does not have or that contradict each other.
    """
    section = config.get("scheduler")
    if not isinstance(section, Mapping) or section.get("type") not in SCHEDULERS:
        return None
    kind = SCHEDULERS[section["type"]]
    params = section.get("params", {})
    if not isinstance(params, Mapping):
        raise ConfigError(
            f"scheduler.params must be an object with keys of its own, got {params!r}"
        )
    try:
        kind(_NoOptimizer(), **params)
    except TypeError as error:
        names = ", ".join(
            name for name in inspect.signature(kind).parameters if name != "optimizer"
        )
        raise ConfigError(
            f"scheduler.params of {section['type']}: {error}; it has {names}"
        ) from None
    return lambda optimizer: kind(optimizer, **params)
