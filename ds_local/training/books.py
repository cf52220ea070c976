"""The books of a run, which rank 0 keeps: metrics.jsonl, report.html, the pictures at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from ds_local.checkpoints.metrics_file import MetricsFile
from ds_local.engine.reports import SegmentReport
from ds_local.errors import SaveError
from ds_local.links.logs import LOG, say
from ds_local.outputs import reason
from ds_local.training import report
from ds_local.training.callbacks import Callback, Run, Validation
from ds_local.training.clock import Clock
from ds_local.training.pace import Pace
from ds_local.training.pictures import draw_diagnostics, draw_losses, summary_table
from ds_local.training.run_folder import RunFolder
from ds_local.training.run_record import RunRecord


class Books(Callback):
    """Keeps them for one start of a run.

    Args:
        run_folder: of the run.
        metrics: its metrics.jsonl.
        clock: of the seconds in its rows.
        pace: of the speeds in its rows.
        stage_of: segment -> stage.
        more: tokens that steps before this start had more than as many have now.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        metrics: MetricsFile,
        clock: Clock,
        pace: Pace,
        stage_of: Sequence[int],
        more: int = 0,
    ) -> None:
        self.folder, self.lock = run_folder.path, run_folder.lock
        self.metrics, self.clock, self.pace = metrics, clock, pace
        self._stage_of, self._more = stage_of, more
        self._problem = ""
        self._reported = self._report_seconds = 0.0  # when, and how long it took

    # --- rows -----------------------------------------------------------------------------------

    def on_report(self, run: Run, reports: Sequence[SegmentReport]) -> None:
        speeds = self.pace.figures(reports[0].step - 1, max(r.seconds for r in reports))
        self._write(
            [
                self._row("train", r.step, r.segment)
                | {
                    "loss": r.loss,
                    "has_loss": r.loss is not None,
                    **({} if r.router_loss is None else {"router_loss": r.router_loss}),
                    "nonfinite": r.nonfinite,
                    "nonfinite_step": r.nonfinite_step,
                    "skipped": r.skipped,
                    "grad_norm": r.grad_norm,
                    "lr": r.lr,
                    "idle_share": round(r.idle_share, 4),
                    "step_seconds": round(r.seconds, 4),
                    "memory_bytes": r.memory_bytes,
                    "sent_bytes": r.sent_bytes,
                    "exchanged_bytes": r.exchanged_bytes,
                    "slowest_link": r.slowest_link,
                    **speeds,
                }
                for r in reports
            ]
        )

    def on_validation(self, run: Run, validation: Validation) -> None:
        memory = validation.memory_bytes
        found: dict[str, dict[int, dict[str, Any]]] = {
            "validation": {
                segment: {"loss": loss, "memory_bytes": memory[self._stage_of[segment]]}
                for segment, loss in validation.losses.items()
            },
            "diagnostics": {
                segment: {"loss": None, **figures}
                for segment, figures in validation.diagnostics.items()
            },
            "sample": validation.samples,
        }
        self._write(
            [
                self._row(split, validation.step, segment) | figures
                for split, segments in found.items()
                for segment, figures in segments.items()
            ]
        )
        self.write_report()

    def note_event(self, event: dict[str, Any]) -> None:
        """What was not finite and ends the run; its figures could not travel any more."""
        self._write([self._row("event", event["step"], event["segment"]) | {"loss": None} | event])
        self.write_report(last=True)

    def _row(self, split: str, step: int, segment: int) -> dict[str, Any]:
        return {
            "step": step,
            "segment": segment,
            "stage": self._stage_of[segment],
            "split": split,
            "tokens": step * self.pace.tokens + self._more,
            "seconds": self.clock.seconds,
        }

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to metrics.jsonl, or keep them until there is room."""
        if self.lock.is_lost:
            self.lock.check()
        error = self.metrics.write(rows)
        problem = "" if error is None else reason(error, self.folder)
        if problem and problem != self._problem:
            say(f"cannot write {self.metrics.path}: {problem}; its rows wait until it can be")
        self._problem = problem

    def settle(self) -> None:
        """All rows are on the disk. Raises SaveError when it does not take them, RunError when
        another process has the folder."""
        self.lock.check()
        try:
            self.metrics.sync()
        except OSError as error:
            why = reason(error, self.folder)
            raise SaveError(f"cannot write {self.metrics.path}: {why}") from error

    # --- pictures -------------------------------------------------------------------------------

    def write_report(self, last: bool = False) -> None:
        """report.html, as far as the run has come. What keeps it from being written stops nobody,
        and it takes at most a twentieth of the time."""
        began = time.perf_counter()
        if not last and began - self._reported < 20 * self._report_seconds:
            return
        with self.clock.paused():
            try:
                report.write([RunRecord(self.folder)], self.folder / "report.html")
            except Exception as error:  # the run is worth more than its picture
                LOG.exception("no report: %s", error)
        self._reported = time.perf_counter()
        self._report_seconds = self._reported - began

    def on_end(self, run: Run) -> None:
        self.write_report(last=True)
        picture = self.folder / "loss.png"
        try:
            draw_losses(self.metrics.path, picture)
            if run.engine.section.diagnostics:
                draw_diagnostics(self.metrics.path, self.folder / "diagnostics.png")
        except Exception as error:  # the run is worth more than its pictures
            LOG.exception("no pictures: %s", error)
        print(summary_table(self.metrics.read()))
        print(f"{run.ending} at step {run.step}; report: {self.folder / 'report.html'}")
        print(f"loss curves: {picture}; checkpoints: {self.folder / 'checkpoints'}")
        sys.stdout.flush()
