"""The loop over steps: train, validate, save, and tell the callbacks."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ds_local.checkpoints.metrics_file import METRICS_FILE, MetricsFile
from ds_local.checkpoints.run_fields import TRAIN, VALIDATION
from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.recorder import Recorder
from ds_local.errors import SaveError
from ds_local.links.agreement import gather, together
from ds_local.links.logs import LOG, say
from ds_local.outputs.checkpoint_names import tag_of
from ds_local.training import diagnostics, profiling
from ds_local.training.books import Books
from ds_local.training.callbacks import Callback, Row, Standing, Validation
from ds_local.training.clock import Clock
from ds_local.training.keeping import KeepBest, KeepLast
from ds_local.training.pace import Pace
from ds_local.training.progress import Progress
from ds_local.training.run_folder import RunFolder
from ds_local.training.samples import sample
from ds_local.training.units import catch_up, join_replicas


class Loop:
    """Steps until done. Rank 0 keeps the books and has the console; see `callbacks.Run` for what
    callbacks may ask of it. Making one is a collective call.

    Args:
        args: of `scripts/train.py`.
        run: its folder.
        callbacks: of the user, told after our own.
    """

    def __init__(
        self,
        args: Namespace,
        run: RunFolder,
        engine: LocalPipelineEngine,
        data: TokenData,
        shape: BatchShape,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.args, self.folder, self.engine, self.data = args, run.path, engine, data
        self.say, self.shape, self.max_steps = run.say, shape, args.max_steps
        self.is_first = engine.global_rank == 0
        self.ending = ""  # why the run ends, once it does
        self.validation: Validation | None = None  # the last one
        metrics, seconds = MetricsFile(run.path / METRICS_FILE), 0.0
        if self.is_first:
            self._continue_points(metrics.read())
            seconds, damaged = metrics.keep_until(engine.global_steps)
            if damaged:
                run.say(
                    f"{metrics.path} had {damaged} damaged lines, now in "
                    f"{metrics.damaged_path.name}; all others are kept"
                )
        self.clock = Clock(seconds)
        own: list[Callback] = [KeepLast(args.keep_last)] if args.keep_last else []
        own += [KeepBest()] if args.keep_best else []
        self.books: Books | None = None
        self.progress: Progress | None = None
        if self.is_first:
            pace = Pace.of(engine, shape.per_step * data.seq_len, data.seq_len)
            more = self.sequences_at(0) * data.seq_len
            self.books = Books(run, metrics, self.clock, pace, engine.module.stage_of, more)
            self.progress = Progress(self.step, self.max_steps, pace)
            own = [self.books, self.progress, *own]
        self.callbacks = [*own, *callbacks]
        rows = metrics.read() if self.is_first else []
        self._written = {r["step"] for r in rows if r["split"] == "validation"}
        engine.reports.listeners.append(lambda reports: self._tell("on_report", reports))
        engine.events.say = _say
        self._under_way = ""  # tag of a save that has not been concluded
        if engine.saves is not None:
            engine.saves.tell = self._say_why_not
        with engine.meeting("the start of the run"):
            known = any(r["step"] == self.step and r["split"] == "validation" for r in rows)
            self.standing, self._validated = gather(
                (Standing.of(rows), self.step if known else -1)
            )[0]

    def _continue_points(self, rows: Sequence[Row]) -> None:
        """Monitors have what an earlier start wrote after the checkpoint that this one begins
        with."""
        newest = {TRAIN: 0, VALIDATION: -1}
        for row in rows:
            newest[row["split"]] = max(row["step"], newest.get(row["split"], 0))
        self.engine.points.skip_until(newest[TRAIN], newest[VALIDATION])

    @property
    def step(self) -> int:
        return self.engine.global_steps

    def sequences_at(self, step: int) -> int:
        """Sequences that training has had after so many steps: their number in a step may have
        changed before this start."""
        jobs = self.shape.per_step // self.engine.train_batch_size()  # replicas of a unit are jobs
        seen: int = self.engine.global_samples * jobs
        return seen + (step - self.step) * self.shape.per_step

    def end(self, why: str) -> None:
        self.ending = self.ending or why

    def _tell(self, what: str, *news: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(self, *news)

    # --- steps ----------------------------------------------------------------------------------

    def run(self) -> None:
        engine, args = self.engine, self.args
        batches = None
        if self.step >= self.max_steps and engine.units.had_ended(self.step):
            return self._finish(None)
        join_replicas(self)
        first = engine.units.join(self.step)
        if engine.module.unit is not None:
            self._validated = -1  # units above may lack what this one has seen
        if engine.reads_data:
            seen = self.sequences_at(first)
            batches = training_batches(self.data, engine.section.seed, seen, self.shape)
        if args.profile:
            engine.recorder = Recorder(engine.device)
        engine.ends_after(self.max_steps)
        saved = self.step if args.resume else -1
        catch_up(self, first, batches)
        self._see_whether_to_stop()
        if self.is_due(self.step) and self._validated != self.step:  # a stop may have left it out
            self.validate()
        while self.step < self.max_steps and not self._is_over:
            engine.train_batch(batches)
            self.clock.start()
            self._log()
            self._tell("on_step")
            if self.is_due(self.step) and not engine.should_stop:
                self.validate()
            if _due(self.step, args.save_every) and self.save():
                saved = self.step
        whole = self._concluded()
        if saved != self.step or not whole:
            self._save()
            self._conclude()
        if self._validated != self.step and not engine.should_stop:
            self.validate()
        self._finish(batches)

    def is_due(self, step: int) -> bool:
        """Is there a validation after so many steps, if that is not the end?"""
        return _due(step, self.args.eval_every)

    @property
    def _is_over(self) -> bool:
        return bool(self.ending) or self.engine.should_stop

    def _finish(self, batches: Iterator[tuple[Tensor, Tensor]] | None) -> None:
        stopped = self.engine.should_stop
        self._concluded()
        self.end("stopped as asked" if stopped else "finished")
        self.close()
        self.engine.units.end(not stopped)
        if self.args.profile and not stopped:
            inputs = None if batches is None else next(batches)
            profiling.write(self.engine, inputs, self.folder, self.data.seq_len)
        self._tell("on_end")

    def _log(self) -> None:
        engine = self.engine
        if self.step % (engine.steps_per_print() or self.max_steps) == 0:
            own = {segment: round(loss, 4) for segment, loss in engine.losses_read.items()}
            LOG.info("step %d, loss of segments %s", self.step, own)

    def close(self) -> None:
        """The console is free again."""
        if self.progress is not None:
            self.progress.close()

    def note_last_event(self) -> None:
        """What ended the run goes into metrics.jsonl too."""
        event = self.engine.last_event
        if self.books is not None and event is not None:
            self.books.note_event(event)

    # --- where stages meet ----------------------------------------------------------------------

    def validate(self) -> None:
        """Every segment's loss, and what else is asked for at a validation; callbacks are told. A
        collective call."""
        engine, args = self.engine, self.args
        batches = validation_batches(self.data, self.shape, args.eval_sequences)
        with self.clock.paused():
            with engine.average.in_place() if args.eval_ema else nullcontext():
                engine.eval_batch(iter(batches), num_micro_batches=len(batches))
                if engine.should_stop:  # not all of it has been seen
                    return
                losses = engine.eval_losses
                sampled = sample(engine, self.data, batches[0][0], args.sample_tokens)
            held = profiling.most_held(engine)
            probed = diagnostics.probe(engine, batches[0]) if engine.section.diagnostics else {}
            # what is decided by it is decided by rank 0's number, to the bit
            last = max(losses, default=engine.num_segments - 1)
            loss = gather(losses.get(last, math.nan))[0]
            self.standing = self.standing.after(loss)
            self._validated, worse = self.step, self.standing.worse
            self.validation = Validation(
                self.step, losses, loss, not worse, worse, held, probed, sampled
            )
            if engine.module.unit is None or (losses and self.step not in self._written):
                self._tell("on_validation", self.validation)
            self._written.add(self.step)
            self._see_whether_to_stop()

    def _see_whether_to_stop(self) -> None:
        """Early stopping; every rank has the same standing."""
        limit, worse = self.args.stop_after_worse, self.standing.worse
        if limit and worse >= limit:
            best = f"the best validation loss is {self.standing.best:.4f}"
            self.end(f"stopped after {worse} validations in a row without a lower loss ({best})")

    def save(self, tag: str | None = None) -> bool:
        self._concluded()
        try:
            self._save(tag)
            if self.engine.saves is None:
                self._conclude()
        except SaveError as error:
            self._say_why_not(error, tag)
            return False
        return True

    def _save(self, tag: str | None = None) -> None:
        """All rows of metrics.jsonl are on the disk before `latest` names their step."""
        with self.clock.paused():
            with self.engine.meeting(f"the save after step {self.step}"):
                self.engine.reports.flush()
                together(self.books.settle if self.books is not None else lambda: None)
            folder = self.folder / "checkpoints"
            self.engine.save_checkpoint(str(folder), tag, save_latest=tag is None)
            self._under_way = tag or tag_of(self.step)

    def _conclude(self) -> None:
        """Wait for the save under way; it is whole now.

        Raises:
            SaveError: it is not.
        """
        tag, self._under_way = self._under_way, ""
        if tag:
            with self.clock.paused():
                self.engine.wait_for_save()
                self._tell("on_save", tag)

    def _concluded(self) -> bool:
        """As `_conclude`, where a thread has told why it is not."""
        try:
            self._conclude()
        except SaveError:
            return False
        return True

    def _say_why_not(self, error: SaveError, tag: str | None = None) -> None:
        LOG.error("%s", error)
        every = self.args.save_every
        if self.is_first:
            again = f", step {(self.step // every + 1) * every} saves again" if every else ""
            say(f"{error}; training goes on{'' if tag else again}")


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _say(sentence: str) -> None:
    """To the console and this rank's log."""
    LOG.warning("%s", sentence)
    say(sentence)
