"""The scheme: which loss trains which segment, and when."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from ds_local.config.strict import Strict

Mode = Literal[
    "backprop",
    "local",
    "chunked",
    "shifted_chunked",
    "overlapping",
    "interlocking",
    "deep_supervision",
]
WINDOWED = ("chunked", "shifted_chunked", "overlapping", "interlocking")  # take a window
DEFAULT_WINDOW = 2


class Row(Strict):
    """A mode and its options, of which the route table follows (see `routes.py`)."""

    mode: Mode = "local"
    """Which loss trains which segment."""
    window: PositiveInt | None = None
    """Segments in a chunk, losses a segment hears, or loss distance plus one. Default 2 where the
    mode takes one."""
    combine: Literal["sum", "mean"] = "sum"
    """How overlapping combines the losses a segment hears."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Factors of the losses of deep_supervision, one per segment. Default all 1."""

    @property
    def period(self) -> int:
        """Steps after which schedules repeat: more than 1 where chunks shift."""
        return self.window or DEFAULT_WINDOW if self.mode == "shifted_chunked" else 1


class MixEntry(Row):
    """An entry that some micro-batches of each step follow."""

    micro_batches: PositiveInt | Literal["auto"] | None = None
    """How many micro-batches of a step follow this entry. Left out in one: that one takes the rest.
    "auto": as many as the pipeline can hide, one segment on each stage: half of them where
    they are twice as many as the segments."""


class Scheme(Row):
    """One mode for all micro-batches of a step, or a mix of several."""

    mix: tuple[MixEntry, ...] | None = None
    """Entries for the micro-batches of one step, those that should go first at the front. Replaces
    `mode`."""
    correction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """How far the first of two entries of a mix makes up for what the second one learns from: 0,
    not at all; 1, the mean gradient of a step is the first one's (a control variate), with more
    noise."""

    run_ahead: Annotated[NonNegativeInt, Field(le=2**16)] | Literal["auto"] = 0
    """Forwards of later steps that a segment may run before it updates, where gradients cross
    borders of segments: no stage waits for gradients to come back. Every update takes its own
    step's micro-batches, but some of them went forward, and go backward, with older weights, of
    which a stage keeps copies. "auto": as many as leave no stage waiting, one for each segment up
    to the furthest loss, one in chunks of two, two or more where `link.transfer` says that links
    are slow."""
    predict_weights: bool = False
    """With run_ahead: micro-batches that cross an update go forward and backward with weights on
    which the last update is added once more for each update they cross. Costs one more copy."""
    delay_discount: Annotated[NonNegativeFloat, Field(le=10)] = 0.0
    """With run_ahead: a segment's learning rate is divided by 1 + its delay, in steps on average,
    to this power."""

    @model_validator(mode="after")
    def _mode_or_mix(self) -> Scheme:
        if self.mix is not None:
            clash = self.model_fields_set & set(Row.model_fields)
            if clash:
                raise ValueError(f"give either mix or {', '.join(sorted(clash))}, not both")
            if not self.mix or sum(entry.micro_batches is None for entry in self.mix) > 1:
                raise ValueError(
                    "mix needs at least one entry, and at most one entry without micro_batches"
                )
            if [entry.micro_batches for entry in self.mix] != ["auto", None] and any(
                e.micro_batches == "auto" for e in self.mix
            ):
                raise ValueError(
                    'micro_batches "auto" is for the first of two entries, the second one takes '
                    "the rest"
                )
        if self.correction and len(self.mix or ()) != 2:
            raise ValueError(
                f"correction is between the two entries of a mix, got {len(self.mix or ())}: leave "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _runs_ahead_of_gradients(self) -> Scheme:
        rows = self.mix or (self,)
        if not self.run_ahead:
            for name in ("predict_weights", "delay_discount"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} corrects what run_ahead delays: set run_ahead, or leave it out"
                    )
            return self
        if all(row.mode == "local" for row in rows):
            raise ValueError(
                "run_ahead is for gradients that cross segments, and with mode 'local' none does: "
                "leave it out"
            )
        if any(row.mode == "shifted_chunked" for row in rows):
            raise ValueError(
                "run_ahead needs the same chunks in every step, and those of mode "
                "'shifted_chunked' move: leave run_ahead out"
            )
        if any(entry.micro_batches == "auto" for entry in self.mix or ()):
            raise ValueError(
                'run_ahead hides any number of micro-batches: give a number instead of "auto", or '
                "leave run_ahead out"
            )
        return self

    @property
    def period(self) -> int:
        """Steps after which schedules repeat: that of the row, or of the mix."""
        return math.lcm(*(entry.period for entry in self.mix)) if self.mix else super().period


class Phase(Scheme):
    """A scheme that holds for a stretch of the run."""

    until_step: PositiveInt | None = None
    """First optimizer step (counted from 0) that no longer follows this phase. Only the last phase
    leaves it out."""
