"""The "local_parallel" section of ds_config.json.

DeepSpeed reads the same file and ignores our section. Inside it an unknown key is an error that
names the nearest key.

No torch, no DeepSpeed.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ds_local.config.scheme import Phase, Scheme
from ds_local.config.sections import (
    HeadConfig,
    LayoutConfig,
    LinkConfig,
    NonFiniteConfig,
    ReplicasConfig,
)
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError


class LocalParallelConfig(Scheme):
    """The "local_parallel" section."""

    num_stages: PositiveInt | None = None
    """Pipeline stages. Default: given by the caller or the command line."""
    segments_per_stage: PositiveInt = 1
    """Segments each stage holds; K = num_stages x segments_per_stage."""
    phases: tuple[Phase, ...] | None = None
    """Schemes for successive stretches of the run. Replaces `mode` and `mix`."""
    cycle_steps: PositiveInt | None = None
    """Phases start over after so many optimizer steps. Default: never."""
    partition: str = "cost"
    """How `causal_lm` models are cut: "cost" balances floating-point operations (heads and readout
    included), "uniform" gives each segment as many blocks; or the path of a profile.json, whose
    measured times are balanced."""
    parts: tuple[NonNegativeInt, ...] | None = None
    """Layer boundaries of the segments, K + 1 increasing numbers from 0 to the number of layers.
    Replaces `partition`."""
    layout: LayoutConfig = LayoutConfig()
    """Which ranks hold which stage."""
    link: LinkConfig = LinkConfig()
    """Messages between stages."""
    head: HeadConfig = HeadConfig()
    """Auxiliary heads."""
    split_backward: Annotated[int, Field(ge=0, le=2)] = 0
    """Send input gradients first and defer the weight gradients of linear layers to the time in
    which a stage would wait, in chunks and under backpropagation; meant for one segment a stage. 1:
    with as many live micro-batches on every stage as 1F1B has on its first (ZB-H1); 2: with twice
    as many, which leaves no bubble from 2P - 1 micro-batches a step on (ZB-H2). Deferred gradients
    keep the inputs and output gradients of their layers, under activation checkpointing too."""
    schedule: str | tuple[str, ...] | None = None
    """Files with the order in which stages compute, in place of our own: a CSV of torch's
    pipelining (a row is a stage, a cell like 2F0 an action) or the text of a grid; a list has one
    for each schedule of the run. They are checked against the scheme and `link.depth`, and say
    which stage holds which segments."""
    loss_weighting: Literal["micro_batch", "token"] = "micro_batch"
    """What counts the same in a step: its micro-batches (and replicas), as in DeepSpeed, or the
    tokens that they predict, as in an evaluation, over all micro-batches and the replicas that
    average gradients. "token" reads a step's micro-batches before its first forward; it needs a
    language model."""
    compile: bool = False
    """`torch.compile` every layer and head, as `engine.compile()` does, which also takes a backend
    and its options."""
    async_save: bool = False
    """A save copies weights and optimizer state to host memory, and a thread writes them while
    training goes on; one save at a time. Takes host memory for this rank's part of a checkpoint."""
    replicas: ReplicasConfig = ReplicasConfig()
    """The data-parallel axis."""
    on_nonfinite: NonFiniteConfig = NonFiniteConfig()
    """What becomes of a step whose loss, gradient or activations are not finite. "stop": the first
    one ends the run, as {"skip": 1} does."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Also keep a running average of the weights, in fp32: the share of it that stays in a step,
    such as 0.999, less in the first steps. It is saved with checkpoints; `scripts/train.py
    --eval-ema` validates it, `export_hf.py --ema` exports it."""
    seed: NonNegativeInt = 1234
    """Seed of weights and dropout."""
    diagnostics: bool = False
    """At every validation compare each segment's local gradient with the true one, and look at the
    hidden states between segments (`diagnostics.py`). Needs fp32 and ZeRO stage 0."""
    lr_multipliers: tuple[PositiveFloat, ...] | None = None
    """Factors on the learning rate, one per segment."""
    clip_multipliers: tuple[PositiveFloat, ...] | None = None
    """Factors on gradient_clipping, one per segment (fp32 without ZeRO, where every segment is
    clipped by itself)."""
    warmup_stagger: NonNegativeInt = 0
    """Segment s ramps its learning rate up over s times so many steps, on top of the scheduler's
    warm-up."""

    @model_validator(mode="after")
    def _compiled_whole(self) -> LocalParallelConfig:
        if self.compile and self.split_backward:
            raise ValueError(
                "compile makes one piece of what split_backward takes apart; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _no_probes_in_files(self) -> LocalParallelConfig:
        if self.schedule is not None and self.diagnostics:
            raise ValueError(
                "diagnostics has schedules of its own, and schedule says how to compute: leave one "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _averages_of_one_model(self) -> LocalParallelConfig:
        if self.ema is not None and self.replicas.sync != "gradients":
            raise ValueError(
                "ema needs the same weights on all replicas, and with replicas.sync "
                f"{self.replicas.sync!r} they train apart: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _runs_ahead_alone(self) -> LocalParallelConfig:
        if not any(scheme.run_ahead for _, scheme in self.schemes()):
            return self
        apart = self.replicas.sync != "gradients"
        for key, is_set, why in (
            ("split_backward", self.split_backward, "leaves no time for"),
            ("diagnostics", self.diagnostics, "has no gradients of the same weights to compare in"),
            ("replicas.sync", apart, "needs the same weights on all replicas, without"),
        ):
            if is_set:
                raise ValueError(f"run_ahead {why} {key}: leave one of them out")
        return self

    @model_validator(mode="after")
    def _no_copies_of_parts(self) -> LocalParallelConfig:
        if (
            self.replicas.sync == "subnets"
            and self.head.blocks_from == "next_tracked"
            and self.head.blocks
        ):
            raise ValueError(
                "head.blocks_from 'next_tracked' follows whole blocks, but with replicas.sync "
                "'subnets' each replica holds a part of them; use 'next' or 'new'"
            )
        return self

    @model_validator(mode="after")
    def _phases_in_order(self) -> LocalParallelConfig:
        if self.phases is not None:
            clash = self.model_fields_set & set(Scheme.model_fields)
            if clash:
                raise ValueError(f"give either phases or {', '.join(sorted(clash))}, not both")
            given = [phase.until_step for phase in self.phases]
            ends = [end for end in given if end is not None]
            if (
                len(ends) != len(given) - 1
                or given[-1] is not None
                or any(a >= b for a, b in pairwise(ends))
            ):
                raise ValueError(
                    "phases need increasing until_step values and a last phase without one, got "
                    f"{given}"
                )
        if self.cycle_steps is not None:
            self._check_cycle(self.cycle_steps)
        return self

    def _check_cycle(self, steps: int) -> None:
        last_start = self.schemes()[-1][0]
        if not last_start or last_start >= steps:
            raise ValueError(
                f"cycle_steps must end in the last of several phases, after step {last_start}, got "
                f"{steps}"
            )
        period = math.lcm(*(scheme.period for _, scheme in self.schemes()))
        if steps % period:
            raise ValueError(
                f"shifted chunks come round every {period} steps: make cycle_steps a multiple of "
                f"that, got {steps}"
            )

    def check_lengths(self, num_segments: int) -> None:
        """Raises ConfigError when a list with an entry per segment has another length."""
        lists = {
            "lr_multipliers": (self.lr_multipliers, num_segments),
            "clip_multipliers": (self.clip_multipliers, num_segments),
            "head.blocks": (self.head.blocks, num_segments - 1),
            "link.codec": (self.link.codec, num_segments - 1),
        }
        for key, (value, wanted) in lists.items():
            if isinstance(value, tuple) and len(value) != wanted:
                raise ConfigError(
                    f"{SECTION}.{key} has {len(value)} entries; {num_segments} segments need "
                    f"{wanted}: change the list"
                )

    @property
    def scales_learning_rates(self) -> bool:
        discounts = any(scheme.delay_discount for _, scheme in self.schemes())
        return self.lr_multipliers is not None or self.warmup_stagger > 0 or discounts

    def lr_multiplier(self, segment: int, step: int) -> float:
        """Factor on a segment's learning rate in optimizer step `step` (counted from 0)."""
        ramp = min(1.0, (step + 1) / (1 + segment * self.warmup_stagger))
        return ramp * (self.lr_multipliers[segment] if self.lr_multipliers else 1.0)

    def clip_multiplier(self, segment: int) -> float:
        return self.clip_multipliers[segment] if self.clip_multipliers else 1.0

    def scheme_at(self, step: int) -> Scheme:
        """The scheme of optimizer step `step` (counted from 0)."""
        step %= self.cycle_steps or step + 1
        for phase in self.phases or ():
            if phase.until_step is None or step < phase.until_step:
                return phase
        return self

    def last_of_phase(self, step: int) -> int | None:
        """The last step of the phase that `step` is in; None: it does not end."""
        ends = [phase.until_step for phase in self.phases or ()] or [None]
        within = step % self.cycle_steps if self.cycle_steps else step
        end = next(end for end in ends if end is None or within < end) or self.cycle_steps
        return None if end is None else step - within + end - 1

    def distinct_steps(self) -> list[int]:
        """Steps whose schedules together show every schedule of the run."""
        return [
            step for start, scheme in self.schemes() for step in range(start, start + scheme.period)
        ]

    def schemes(self) -> list[tuple[int, Scheme]]:
        """(first step, scheme) of every stretch of the run."""
        starts = [0, *(phase.until_step or 0 for phase in self.phases or ())]
        return list(zip(starts, self.phases or (self,), strict=False))
