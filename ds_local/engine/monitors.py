"""Points for DeepSpeed's monitors (TensorBoard, W&B, CSV, Comet): each once, at steps that rise.

W&B drops what comes later than a higher step, so all points of a step go out together, those of
training before those of a validation. Their step is DeepSpeed's: samples so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_local.engine.reports import SegmentReport

TRAIN, VALIDATION = "Train", "Validation"
_FIGURES = ("loss", "router_loss", "grad_norm", "lr", "idle_share", "skipped")


def take_monitor(monitor: Any) -> Any:
    """DeepSpeed's monitor, which from now on is ours to write to; None where nothing is to be told.

    The engine would write learning rates ahead of reports. Its csv files would get another header
    in the middle where a run goes on.
    """
    if not monitor.enabled:
        return None
    monitor.enabled = False
    if (csv := monitor.csv_monitor) is not None:
        csv.filenames += [path.stem for path in Path(csv.log_dir).glob("*.csv")]
    return monitor


class Points:
    """What a run's monitors are given, on rank 0.

    Args:
        monitor: DeepSpeed's; None: there is nobody to tell.
        samples_per_step: sequences of a step.
        stage_of: segment -> stage.
    """

    def __init__(self, monitor: Any, samples_per_step: int, stage_of: Sequence[int]) -> None:
        self._monitor = monitor
        self._samples_per_step, self._stage_of = samples_per_step, stage_of
        self._newest = {TRAIN: 0, VALIDATION: -1}  # steps that have been told of

    def skip_until(self, train: int, validation: int) -> None:
        """An earlier start of the run, which went on after the checkpoint that this one begins
        with, has told of these steps."""
        self._newest = {TRAIN: train, VALIDATION: validation}

    def trained(self, reports: Sequence[SegmentReport]) -> None:
        """The figures of all segments of a step have come together."""
        points: dict[str, float | None] = {}
        for r in reports:
            tag = f"{TRAIN}/stage_{r.stage}/segment_{r.segment}"
            points |= {f"{tag}/{name}": getattr(r, name) for name in _FIGURES}
        points |= {"Train/Samples/train_loss": reports[-1].loss, "Train/Samples/lr": reports[0].lr}
        self._write(TRAIN, reports[0].step, points)

    def validated(self, step: int, losses: Mapping[int, float]) -> None:
        """A whole validation is done.

        Args:
            losses: by segment; none for an evaluation without losses.
        """
        if not losses:
            return
        points: dict[str, float | None] = {
            f"{VALIDATION}/stage_{self._stage_of[segment]}/segment_{segment}/loss": loss
            for segment, loss in losses.items()
        }
        points["Train/Samples/eval_loss"] = losses[max(losses)]  # DeepSpeed's own name for it
        self._write(VALIDATION, step, points)

    def _write(self, kind: str, step: int, points: Mapping[str, float | None]) -> None:
        if self._monitor is None or step <= self._newest[kind]:
            return
        self._newest[kind] = step
        samples = step * self._samples_per_step
        self._monitor.write_events(
            [(tag, value, samples) for tag, value in points.items() if value is not None]
        )
