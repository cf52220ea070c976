"""What a run tells whoever wants to know, so that nobody has to copy the loop to change it.

Write a class with the methods you need and pass objects of it to `ds_local.train`:

    class Tell(ds_local.Callback):
        def on_validation(self, run, validation):
            if validation.is_best and run.is_first:
                print(f"step {run.step}: {validation.loss:.4f}")

    ds_local.train(..., callbacks=[Tell()])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ds_local.checkpoints.metrics_file import of_full_model
from ds_local.config.files import nearest
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.reports import SegmentReport
from ds_local.errors import ConfigError

Row = Mapping[str, Any]


class Standing(NamedTuple):
    """How the full model stands after its validations so far."""

    best: float = math.inf  # the least loss
    worse: int = 0  # validations since then, all without a lower one

    def after(self, loss: float) -> Standing:
        """After one more validation; a loss that is not finite is worse than any."""
        return Standing(loss) if loss < self.best else Standing(self.best, self.worse + 1)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Standing:
        """After those in rows of metrics.jsonl."""
        standing = cls()
        for row in of_full_model(row for row in rows if row["split"] == "validation"):
            standing = standing.after(math.nan if row["loss"] is None else row["loss"])
        return standing


class Validation(NamedTuple):
    """What came of a validation, the same on every rank but for the samples.

    Attributes:
        step: optimizer steps done.
        losses: by segment, of those that have a loss.
        loss: of the full model; NaN or infinite if that is what it was.
        is_best: is that the least of the run so far?
        worse: validations in a row that were not, this one included.
        memory_bytes: by stage, the most that one of its ranks has held so far.
        diagnostics: by segment, with `"diagnostics": true`.
        samples: by segment "prompt" and "text", on rank 0, with `sample_tokens`.
    """

    step: int
    losses: dict[int, float]
    loss: float
    is_best: bool
    worse: int
    memory_bytes: dict[int, int]
    diagnostics: dict[int, dict[str, float]]
    samples: dict[int, dict[str, Any]]


class Run(Protocol):
    """What a callback is given.

    Attributes:
        engine: of this rank.
        folder: of the run.
        max_steps: optimizer steps of the run.
        is_first: is this rank 0, which writes?
        ending: why the run ends; "" until it does.
    """

    engine: LocalPipelineEngine
    folder: Path
    max_steps: int
    is_first: bool
    ending: str

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    def save(self, tag: str | None = None) -> bool:
        """Save a checkpoint, by default `global_stepN`, which a resumed run goes on from; one with
        a name of its own is only kept. All ranks must call it. False when the disk does not take
        it; what was there before stays, and the run goes on."""

    def end(self, why: str) -> None:
        """End the run when the callbacks have been told. All ranks must call it at the same step,
        as in `on_validation` or `on_save`; from one rank alone call
        `run.engine.request_stop()`."""


class Callback:
    """Override what you need. Every rank calls the methods of its own objects.

    An exception ends the run on all ranks, with its traceback.
    """

    def on_step(self, run: Run) -> None:
        """After every optimizer step. Stages are at different times here, so no collective call;
        `run.engine.losses_read` has the losses of this stage's segments."""

    def on_report(self, run: Run, reports: Sequence[SegmentReport]) -> None:
        """On rank 0, when the figures of all segments of a step have come together there: every
        `steps_per_print` steps, some steps late."""

    def on_validation(self, run: Run, validation: Validation) -> None:
        """After every validation, where stages meet: collective calls are fine."""

    def on_save(self, run: Run, tag: str) -> None:
        """When the checkpoint `run.folder / "checkpoints" / tag` is whole and has its name. Stages
        meet here too."""

    def on_end(self, run: Run) -> None:
        """When the run has ended well, by its last step, as asked or by a callback. Stages meet
        here too."""


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raises ConfigError for what is no callback, and for a method that nobody would call."""
    known = [name for name in vars(Callback) if name.startswith("on_")]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks holds {callback!r}; give objects of a class derived from "
                "ds_local.Callback"
            )
        for name in dir(callback):
            if name.startswith("on_") and name not in known:
                whose = type(callback).__name__
                raise ConfigError(f"{whose}.{name} is never called; {nearest(name, known)}")
