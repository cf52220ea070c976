"""Losses, idle time and throughput of every stage, from wherever they arise to whoever wants to see
them.

Each segment's figures ride along with the activations, so the last stage knows them all without a
collective. At the reporting interval it mails them to rank 0, which hands them to DeepSpeed's
monitor (TensorBoard, W&B, CSV), to metrics.jsonl and to the progress line. Nobody on the step path
waits for any of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ds_local.links.notices import Mailbox
from ds_local.links.transport import End, Sender

# columns of the figures each segment reports
FIGURES = (
    "step",
    "loss",
    "grad_norm",
    "seconds",
    "waited",
    "sent_bytes",
    "exchanged_bytes",
    "slowest_link",
)


@dataclass(frozen=True)
class SegmentReport:
    """One segment's figures of one optimizer step."""

    step: int  # optimizer steps done
    segment: int
    stage: int
    loss: (
        float | None
    )  # mean over micro-batches and replicas; None where the routes give the segment no loss
    grad_norm: float | None  # before clipping; None when nothing clips
    seconds: float  # of the step, on this stage
    idle_share: float  # part of it spent waiting for a neighbour
    sent_bytes: int  # to neighbouring stages
    exchanged_bytes: (
        int | None
    )  # to other replicas of the stage; None where DeepSpeed averages gradients
    slowest_link: str | None  # the one the stage waited for longest; None when it waited for none


class Traffic:
    """What a rank's links and replicas carry in a step, and how long they keep it waiting.

    Args:
        ends: this rank's end of each of the model's links, None where it has none.
    """

    def __init__(self, ends: Sequence[End | None]) -> None:
        self._ends = ends
        self._before: tuple[list[float], dict[str, float]] = ([], {})

    def begin(self, replicas: Any) -> None:
        self._before = self._totals(replicas)

    def end(self, replicas: Any) -> dict[str, float | None]:
        """Figures of the step since `begin`."""
        waits, totals = self._totals(replicas)
        waits = [now - then for now, then in zip(waits, self._before[0], strict=True)]
        slowest = waits.index(max(waits)) if any(waits) else None
        return {name: now - self._before[1][name] for name, now in totals.items()} | {
            "slowest_link": slowest
        }

    def _totals(self, replicas: Any) -> tuple[list[float], dict[str, float]]:
        waits = [0.0 if end is None else end.waited for end in self._ends]
        return waits, {
            "waited": sum(waits) + replicas.waited,
            "sent_bytes": sum(end.num_bytes for end in self._ends if isinstance(end, Sender)),
            "exchanged_bytes": replicas.num_bytes,
        }


Listener = Callable[[list[SegmentReport]], None]


class Reports:
    """Collects the figures of all segments on rank 0. A part of the engine; making one is a
    collective call.

    Args:
        num_segments, segments_per_stage: of the model.
        every: report every so many optimizer steps; None: only when flushed.
        source: global rank of the last stage of replica 0.
        local_segments: this rank's segments, empty on replicas other than the first.
        links: names of all links; "slowest_link" is a number of one of them.
    """

    def __init__(
        self,
        num_segments: int,
        segments_per_stage: int,
        every: int | None,
        source: int,
        local_segments: range,
        links: Sequence[str],
    ) -> None:
        self.figures = torch.full((num_segments, len(FIGURES)), math.nan, dtype=torch.float64)
        self.listeners: list[Listener] = []  # called on rank 0
        self._per_stage = segments_per_stage
        self._every = every
        self._local_segments = local_segments
        self._links = links
        self._last_emitted = 0
        rank = dist.get_rank()
        self._reads, self._writes = rank == 0, rank == source
        group = dist.new_group([0, source], backend="gloo") if source else None
        self._mailbox = (
            Mailbox(group, 0, (num_segments, len(FIGURES))) if self._reads or self._writes else None
        )

    def close_step(self, rows: dict[int, dict[str, Any]]) -> None:
        """Book this rank's figures of the step that ends, and pass on those of the step before,
        which are complete by now."""
        if self._mailbox is not None:
            step = self.figures[0, 0].item()
            if self._writes and self._every and not math.isnan(step) and step % self._every == 0:
                self._mailbox.write(self.figures)
            if self._reads:
                self._emit(self._mailbox.read())
        for segment, row in rows.items():
            self.figures[segment] = torch.tensor(
                [math.nan if row[f] is None else float(row[f]) for f in FIGURES],
                dtype=torch.float64,
            )

    def flush(self) -> None:
        """Bring the reports up to the last step. A collective call over all ranks: stages meet
        here."""
        own = {segment: self.figures[segment].tolist() for segment in self._local_segments}
        mailed = self._mailbox.sent if self._mailbox and self._writes else 0
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (own, mailed))
        if self._reads and self._mailbox is not None:
            self._emit(self._mailbox.read(at_least=max(mailed for _, mailed in gathered)))
            figures = torch.empty_like(self.figures)
            for rows, _ in gathered:
                for segment, row in rows.items():
                    figures[segment] = torch.tensor(row, dtype=torch.float64)
            self._emit([figures])

    def _emit(self, reports: list[Tensor]) -> None:
        for figures in reports:
            step = figures[0, 0].item()
            if math.isnan(step) or step <= self._last_emitted:
                continue
            self._last_emitted = int(step)
            rows = [self._report(segment, row) for segment, row in enumerate(figures.tolist())]
            for listener in self.listeners:
                listener(rows)

    def _report(self, segment: int, row: list[float]) -> SegmentReport:
        figures = {
            name: None if math.isnan(value) else value
            for name, value in zip(FIGURES, row, strict=True)
        }
        seconds, waited = figures["seconds"] or 0.0, figures["waited"] or 0.0
        return SegmentReport(
            int(figures["step"] or 0),
            segment,
            segment // self._per_stage,
            figures["loss"],
            figures["grad_norm"],
            seconds,
            waited / seconds if seconds else 0.0,
            int(figures["sent_bytes"] or 0),
            None if figures["exchanged_bytes"] is None else int(figures["exchanged_bytes"]),
            None if figures["slowest_link"] is None else self._links[int(figures["slowest_link"])],
        )


def monitor_listener(monitor: Any, samples_per_step: int) -> Listener:
    """Writes every report to DeepSpeed's monitor, with tags per stage and segment."""

    def write(reports: list[SegmentReport]) -> None:
        events = []
        for r in reports:
            tag, samples = f"Train/stage_{r.stage}/segment_{r.segment}", r.step * samples_per_step
            events += [
                (f"{tag}/{name}", value, samples)
                for name, value in (
                    ("loss", r.loss),
                    ("grad_norm", r.grad_norm),
                    ("idle_share", r.idle_share),
                )
                if value is not None
            ]
        if reports[-1].loss is not None:
            events.append(
                ("Train/Samples/train_loss", reports[-1].loss, reports[-1].step * samples_per_step)
            )
        monitor.write_events(events)

    return write
