"""The loop over steps: report, evaluate, save, stop when told to."""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections import deque
from typing import Any

from tqdm import tqdm

from ds_local.checkpoints.agreement import gather, together
from ds_local.checkpoints.metrics_file import MetricsFile
from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.recorder import Recorder
from ds_local.engine.reports import SegmentReport
from ds_local.errors import SaveError
from ds_local.links.logs import LOG, say
from ds_local.outputs import reason
from ds_local.training import diagnostics, profiling, report
from ds_local.training.pictures import (
    draw_diagnostics,
    draw_losses,
    summary_table,
    tokens_per_second,
)
from ds_local.training.progress import progress_line
from ds_local.training.run_folder import RunFolder
from ds_local.training.run_record import RunRecord
from ds_local.training.samples import sample

_RECENT = 50  # reports that the pace on the progress line is of


class Loop:
    """Steps until done; rank 0 keeps the books."""

    def __init__(
        self,
        args: Namespace,
        run: RunFolder,
        engine: LocalPipelineEngine,
        data: TokenData,
        shape: BatchShape,
    ) -> None:
        self.args, self.run_folder, self.engine, self.data = args, run.path, engine, data
        self.lock = run.lock
        self.shape = shape
        self.is_first = engine.global_rank == 0
        self.tokens_per_step = shape.per_step * data.seq_len
        self.metrics = MetricsFile(run.path / "metrics.jsonl")
        self.metrics_problem = ""
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0
        self.reported = self.report_seconds = 0.0  # when the last one was written, how long it took
        self.first_step = engine.global_steps
        self.recent: deque[list[dict[str, Any]]] = deque(maxlen=_RECENT)  # rows of reports
        if self.is_first:
            self.earlier_seconds, damaged = self.metrics.keep_until(engine.global_steps)
            if damaged:
                run.say(
                    f"{self.metrics.path} had {damaged} damaged lines, now in "
                    f"{self.metrics.damaged_path.name}; all others are kept"
                )
            engine.reports.listeners.append(self._on_report)
        engine.events.say = _tell
        self.bar = tqdm(
            total=args.max_steps,
            initial=engine.global_steps,
            disable=not self.is_first,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def run(self) -> None:
        engine, args = self.engine, self.args
        batches = None
        if engine.is_first_stage():
            batches = training_batches(
                self.data, engine.section.seed, engine.global_steps, self.shape
            )
        if args.profile:
            engine.recorder = Recorder(engine.device)
        engine.ends_after(args.max_steps)
        saved = engine.global_steps if args.resume else -1
        evaluated = self._last_evaluation()
        while engine.global_steps < args.max_steps and not engine.should_stop:
            engine.train_batch(batches)
            step = engine.global_steps
            if step % (engine.steps_per_print() or args.max_steps) == 0:
                own = {segment: round(loss, 4) for segment, loss in engine.losses_read.items()}
                LOG.info("step %d, loss of segments %s", step, own)
            if step == self.first_step + 1:
                self.started = time.perf_counter()  # the first step pays for warm-up
            if args.eval_every and step % args.eval_every == 0 and not engine.should_stop:
                evaluated = self._evaluate()
            if args.save_every and step % args.save_every == 0 and self._saves(step):
                saved = step
        if saved != engine.global_steps:
            self._save()
        if evaluated != engine.global_steps and not engine.should_stop:
            self._evaluate()
        self.bar.close()
        if args.profile and not engine.should_stop:
            profiling.write(engine, None if batches is None else next(batches), self.run_folder)
        if self.is_first:
            self._conclude()

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def _on_report(self, reports: list[SegmentReport]) -> None:
        """Called on rank 0 with all segments' figures of a step."""
        step = reports[0].step
        seconds = self._seconds()
        self.recent.append(
            [
                {
                    "step": step,
                    "segment": r.segment,
                    "stage": r.stage,
                    "split": "train",
                    "loss": r.loss,
                    "has_loss": r.loss is not None,
                    "tokens": step * self.tokens_per_step,
                    "seconds": round(seconds, 3),
                    "nonfinite": r.nonfinite,
                    "nonfinite_step": r.nonfinite_step,
                    "skipped": r.skipped,
                    "grad_norm": r.grad_norm,
                    "lr": r.lr,
                    "idle_share": round(r.idle_share, 4),
                    "step_seconds": round(r.seconds, 4),
                    "sent_bytes": r.sent_bytes,
                    "exchanged_bytes": r.exchanged_bytes,
                    "slowest_link": r.slowest_link,
                }
                for r in reports
            ]
        )
        self._write(self.recent[-1])
        speed = tokens_per_second([row for rows in self.recent for row in rows])
        self.bar.set_postfix_str(progress_line(reports, speed), refresh=False)
        self.bar.update(step - self.bar.n)

    def note_last_event(self) -> None:
        """What ended the run goes into metrics.jsonl too; its figures could not travel any more."""
        event = self.engine.last_event if self.is_first else None
        if event is not None:
            tokens = event["step"] * self.tokens_per_step
            seconds = round(self._seconds(), 3)
            fixed = {"split": "event", "loss": None, "tokens": tokens, "seconds": seconds}
            self.metrics.write([event | fixed])
            self._report(last=True)

    def _evaluate(self) -> int:
        batches = validation_batches(self.data, self.shape, self.args.eval_sequences)
        began = time.perf_counter()
        self.engine.eval_batch(iter(batches), num_micro_batches=len(batches))
        if self.engine.should_stop:  # not all of it has been seen
            return -1
        held = profiling.most_held(self.engine)
        probed = (
            diagnostics.probe(self.engine, batches[0]) if self.engine.section.diagnostics else {}
        )
        sampled = sample(self.engine, self.data, batches[0][0], self.args.sample_tokens)
        self.started += time.perf_counter() - began  # throughput is that of training
        step = self.engine.global_steps
        if self.is_first:
            bad = [s for s, loss in self.engine.eval_losses.items() if not math.isfinite(loss)]
            if bad:
                _tell(f"step {step}: the validation loss of segments {bad} is not finite")
            stage_of = self.engine.module.stage_of
            found: dict[str, Any] = {
                "validation": {
                    segment: {"loss": loss, "memory_bytes": held[stage_of[segment]]}
                    for segment, loss in self.engine.eval_losses.items()
                }
            }
            found["diagnostics"] = {
                segment: {"loss": None, **figures} for segment, figures in probed.items()
            }
            found["sample"] = sampled
            self._write(
                [
                    {
                        "step": step,
                        "segment": segment,
                        "stage": stage_of[segment],
                        "split": split,
                        "tokens": step * self.tokens_per_step,
                        "seconds": round(self._seconds(), 3),
                        **figures,
                    }
                    for split, segments in found.items()
                    for segment, figures in segments.items()
                ]
            )
            self._report()
        return step

    def _report(self, last: bool = False) -> None:
        """report.html, as far as the run has come. What keeps it from being written stops nobody,
        and it takes at most a twentieth of the time."""
        began = time.perf_counter()
        if not last and began - self.reported < 20 * self.report_seconds:
            return
        try:
            report.write([RunRecord(self.run_folder)], self.run_folder / "report.html")
        except Exception as error:  # the run is worth more than its picture
            LOG.exception("no report: %s", error)
        self.reported = time.perf_counter()
        self.report_seconds = self.reported - began
        self.started += self.report_seconds

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to metrics.jsonl, or keep them until there is room."""
        if self.lock.is_lost:
            self.lock.check()
        error = self.metrics.write(rows)
        problem = "" if error is None else reason(error, self.run_folder)
        if problem and problem != self.metrics_problem:
            say(f"cannot write {self.metrics.path}: {problem}; its rows wait until it can be")
        self.metrics_problem = problem

    def _last_evaluation(self) -> int:
        """The step whose validation metrics.jsonl has, when that is this one; else -1. A collective
        call."""
        step = self.engine.global_steps
        found = self.is_first and any(
            row["step"] == step and row.get("split") == "validation" for row in self.metrics.read()
        )
        with self.engine.meeting("the start of the run"):
            return step if gather(found)[0] else -1

    def _saves(self, step: int) -> bool:
        """Save; where the disk does not take it, training goes on."""
        try:
            self._save()
        except SaveError as error:
            LOG.error("%s", error)
            if self.is_first:
                say(f"{error}; training goes on, step {step + self.args.save_every} saves again")
            return False
        return True

    def _save(self) -> None:
        """All rows of metrics.jsonl are on the disk before `latest` names their step."""
        began = time.perf_counter()
        try:
            with self.engine.meeting(f"the save after step {self.engine.global_steps}"):
                self.engine.reports.flush()
                together(self._settle)
            self.engine.save_checkpoint(str(self.run_folder / "checkpoints"))
        finally:
            self.started += time.perf_counter() - began

    def _settle(self) -> None:
        if not self.is_first:
            return
        self.lock.check()
        try:
            self.metrics.sync()
        except OSError as error:
            why = reason(error, self.run_folder)
            raise SaveError(f"cannot write {self.metrics.path}: {why}") from error

    def _conclude(self) -> None:
        self._report(last=True)
        picture = self.run_folder / "loss.png"
        draw_losses(self.metrics.path, picture)
        if self.engine.section.diagnostics:
            draw_diagnostics(self.metrics.path, self.run_folder / "diagnostics.png")
        what = "stopped as asked" if self.engine.should_stop else "finished"
        print(summary_table(self.metrics.read()))
        print(
            f"{what} at step {self.engine.global_steps}; report: {self.run_folder / 'report.html'}"
        )
        print(f"loss curves: {picture}; checkpoints: {self.run_folder / 'checkpoints'}")
        sys.stdout.flush()


def _tell(sentence: str) -> None:
    """To the console and this rank's log."""
    LOG.warning("%s", sentence)
    say(sentence)
