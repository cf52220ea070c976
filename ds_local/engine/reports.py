"""Losses, idle time and throughput of every stage, from wherever they arise to whoever wants to see
them. A figure may be NaN; one that is not there is marked as such.

Each segment's figures ride along with the activations, so the last stage knows them all without a
collective. At the reporting interval it mails them to rank 0, which hands them to DeepSpeed's
monitors, to metrics.jsonl and to the progress line. Nobody on the step path waits for any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ds_local.engine.finite import KINDS
from ds_local.links.agreement import gather
from ds_local.links.groups import Groups
from ds_local.links.lasting_sender import LastingSender
from ds_local.links.mailbox import Mailbox
from ds_local.links.pair import Sender
from ds_local.links.transport import End
from ds_local.replicas.sync import Together

# columns of the figures each segment reports
FIGURES = (
    "step",
    "loss",
    "router_loss",
    "grad_norm",
    "lr",
    "seconds",
    "waited",
    "sent_bytes",
    "exchanged_bytes",
    "memory_bytes",
    "slowest_link",
    "nonfinite",
    "nonfinite_step",
    "skipped",
)
_COLUMNS = len(FIGURES) + 1  # the last one has a bit for each figure that is there


def to_row(figures: Mapping[str, float | None]) -> list[float]:
    """One segment's figures as a row of numbers; `from_row` gives them back."""
    values = [figures.get(name) for name in FIGURES]
    there = sum(1 << column for column, value in enumerate(values) if value is not None)
    return [0.0 if value is None else float(value) for value in values] + [float(there)]


def from_row(row: Sequence[float]) -> dict[str, float | None]:
    """Figure -> value, None for one that is not there."""
    there = int(row[-1])
    return {
        name: value if there >> column & 1 else None
        for column, (name, value) in enumerate(zip(FIGURES, row[:-1], strict=True))
    }


@dataclass(frozen=True)
class SegmentReport:
    """One segment's figures of one optimizer step."""

    step: int  # optimizer steps done
    segment: int
    stage: int
    loss: float | None  # mean over micro-batches and replicas; None: the routes give it no loss
    grad_norm: float | None  # before clipping; None where nobody needs to know it
    lr: float | None  # that the step was taken with
    seconds: float  # of the step, on this stage
    idle_share: float  # part of it spent waiting for a neighbour
    sent_bytes: int  # to neighbouring stages
    exchanged_bytes: int | None  # to other replicas of the stage; None: DeepSpeed averages
    memory_bytes: int | None  # most that the rank has held so far
    slowest_link: str | None  # the one the stage waited for longest; None when it waited for none
    nonfinite: str | None  # one of `finite.KINDS`, if one came since the last report; the newest
    nonfinite_step: int | None  # its step
    skipped: int  # steps that the stage has left out so far
    router_loss: float | None = None  # of its experts, on replica 0; None: it has none


class Traffic:
    """What a rank's links and replicas carry in a step, and how long they keep it waiting.

    Args:
        ends: this rank's end of each of the model's links, None where it has none.
    """

    def __init__(self, ends: Sequence[End | None]) -> None:
        self._ends = ends
        self._before: tuple[list[float], dict[str, float]] = ([], {})

    def begin(self, replicas: Together) -> None:
        self._before = self._totals(replicas)

    def end(self, replicas: Together) -> dict[str, float | None]:
        """Figures of the step since `begin`."""
        waits, totals = self._totals(replicas)
        waits = [now - then for now, then in zip(waits, self._before[0], strict=True)]
        slowest = waits.index(max(waits)) if any(waits) else None
        return {name: now - self._before[1][name] for name, now in totals.items()} | {
            "slowest_link": slowest
        }

    def _totals(self, replicas: Together) -> tuple[list[float], dict[str, float]]:
        waits = [0.0 if end is None else end.waited for end in self._ends]
        totals = {
            "waited": sum(waits) + replicas.waited,
            "sent_bytes": sum(
                end.num_bytes for end in self._ends if isinstance(end, Sender | LastingSender)
            ),
        }
        if replicas.num_bytes is not None:
            totals["exchanged_bytes"] = replicas.num_bytes
        return waits, totals


Listener = Callable[[list[SegmentReport]], None]


class Reports:
    """Collects the figures of all segments on rank 0. A part of the engine; making one is a call of
    rank 0 and the source.

    Args:
        stage_of: segment -> stage.
        every: report every so many optimizer steps; None: only when flushed.
        source: global rank of the last stage of replica 0.
        local_segments: this rank's segments, empty on replicas other than the first.
        links: names of all links; "slowest_link" is a number of one of them.
        groups: of the engine.
        timeout_seconds: longest wait for reports that are on their way.
        segments: whose figures come together here; default all.
        steps_ahead: that forwards may run ahead. Figures of so many steps travel beside the newest:
            no forward is left to carry them in the last steps before a phase ends.
    """

    def __init__(
        self,
        stage_of: Sequence[int],
        every: int | None,
        source: int,
        local_segments: Sequence[int],
        links: Sequence[str],
        groups: Groups,
        timeout_seconds: float = 300.0,
        steps_ahead: int = 0,
        segments: Sequence[int] | None = None,
    ) -> None:
        self._slots, num_segments = 1 + steps_ahead, len(stage_of)
        # [segment, step modulo slots, column]
        self.figures = torch.zeros((num_segments, self._slots, _COLUMNS), dtype=torch.float64)
        self.listeners: list[Listener] = []  # called on rank 0
        self._stage_of = stage_of
        self._here = list(range(num_segments)) if segments is None else list(segments)
        self._every = every
        self._local_segments = local_segments
        self._links = links
        self._last_emitted = self._last_mailed = 0
        self._kept = 2 + steps_ahead  # steps whose figures may not have come together yet
        self._own: dict[int, dict[int, list[float]]] = {}  # step -> segment -> figures
        self._noted: dict[int, dict[int, Tensor]] = {}  # the same, of all segments
        rank = dist.get_rank()
        self._reads, self._writes = rank == 0, rank == source
        self._mailbox = None
        if self._reads or self._writes:
            group = groups.pair(source if self._reads else 0) if source else None
            self._mailbox = Mailbox(group, (len(self._here), _COLUMNS), timeout_seconds)

    def note(self) -> None:
        """New figures of other segments have come."""
        if self._writes:
            self._note(self._here)

    def _note(self, segments: Iterable[int]) -> None:
        steps = self.figures[..., FIGURES.index("step")].tolist()
        for segment in segments:
            for slot, step in enumerate(map(int, steps[segment])):
                if step > self._last_mailed:
                    rows = self._noted.setdefault(step, {})
                    rows.setdefault(segment, self.figures[segment, slot].clone())

    def close_step(self, rows: dict[int, dict[str, Any]]) -> None:
        """Book this rank's figures of the step that ends, and pass on those of the steps before
        that are complete by now."""
        if self._mailbox is not None:
            if self._writes:
                self._mail()
            if self._reads:
                self._emit(self._mailbox.read())
        for segment, row in rows.items():
            numbers = to_row(row)
            slot = int(row["step"]) % self._slots
            self.figures[segment, slot] = torch.tensor(numbers, dtype=torch.float64)
            if segment in self._local_segments:
                self._own.setdefault(int(row["step"]), {})[segment] = numbers
        for step in sorted(self._own)[: -self._kept]:
            del self._own[step]
        if self._writes:
            self._note(rows)

    def _mail(self) -> None:
        for step in sorted(self._noted):
            rows = self._noted[step]
            if rows.keys() >= set(self._here):
                if self._every and step % self._every == 0 and self._mailbox is not None:
                    self._mailbox.write(torch.stack([rows[segment] for segment in self._here]))
                self._last_mailed = step
        self._noted = {step: rows for step, rows in self._noted.items() if step > self._last_mailed}

    def flush(self) -> None:
        """Bring the reports up to the last step. A collective call over all ranks: stages meet
        here."""
        mailed = self._mailbox.sent if self._mailbox and self._writes else 0
        gathered = gather((self._own, mailed))
        steps: dict[int, dict[int, list[float]]] = {}
        for own, _ in gathered:
            for step, rows in own.items():
                steps.setdefault(step, {}).update(rows)
        newest = max(steps, default=0)
        self._last_mailed = newest
        self._noted.clear()
        if self._reads and self._mailbox is not None:
            self._emit(self._mailbox.read(at_least=max(mailed for _, mailed in gathered)))
            for step, rows in sorted(steps.items()):
                due = step == newest or (self._every and step % self._every == 0)
                if due and len(rows) == len(self._here):
                    figures = [rows[segment] for segment in self._here]
                    self._emit([torch.tensor(figures, dtype=torch.float64)])

    def _emit(self, reports: list[Tensor]) -> None:
        for figures in reports:
            step, before = _step_of(figures), self._last_emitted
            if step <= before:
                continue
            self._last_emitted = step
            rows = [
                self._report(segment, from_row(row), before)
                for segment, row in zip(self._here, figures.tolist(), strict=True)
            ]
            for listener in self.listeners:
                listener(rows)

    def _report(
        self, segment: int, figures: Mapping[str, float | None], before: int
    ) -> SegmentReport:
        def whole(name: str) -> int | None:
            value = figures[name]
            return None if value is None else int(value)

        seconds, waited = figures["seconds"] or 0.0, figures["waited"] or 0.0
        link, kind, event = map(whole, ("slowest_link", "nonfinite", "nonfinite_step"))
        is_new = event is not None and event > before
        return SegmentReport(
            step=whole("step") or 0,
            segment=segment,
            stage=self._stage_of[segment],
            loss=figures["loss"],
            router_loss=figures["router_loss"],
            grad_norm=figures["grad_norm"],
            lr=figures["lr"],
            seconds=seconds,
            idle_share=waited / seconds if seconds else 0.0,
            sent_bytes=whole("sent_bytes") or 0,
            exchanged_bytes=whole("exchanged_bytes"),
            memory_bytes=whole("memory_bytes"),
            slowest_link=None if link is None else self._links[link],
            nonfinite=KINDS[kind] if is_new and kind is not None else None,
            nonfinite_step=event if is_new else None,
            skipped=whole("skipped") or 0,
        )


def _step_of(figures: Tensor) -> int:
    """Of the first segment; 0 before there is one."""
    return int(figures[0, FIGURES.index("step")].item())
