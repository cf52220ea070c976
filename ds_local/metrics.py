"""Losses, idle time and throughput of every stage, from wherever they arise to whoever wants to see them.

Each segment's figures ride along with the activations, so the last stage knows them all without a collective. At the reporting
interval it mails them to rank 0, which hands them to DeepSpeed's monitor (TensorBoard, W&B, CSV), to metrics.jsonl and to the
progress line. Nobody on the step path waits for any of this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ds_local.notices import Mailbox
from ds_local.transport import End, Sender

# columns of the figures each segment reports
FIGURES = ("step", "loss", "grad_norm", "seconds", "waited", "sent_bytes", "exchanged_bytes", "slowest_link")


@dataclass(frozen=True)
class SegmentReport:
    """One segment's figures of one optimizer step."""

    step: int  # optimizer steps done
    segment: int
    stage: int
    loss: float | None  # mean over micro-batches and replicas; None where the routes give the segment no loss
    grad_norm: float | None  # before clipping; None when nothing clips
    seconds: float  # of the step, on this stage
    idle_share: float  # part of it spent waiting for a neighbour
    sent_bytes: int  # to neighbouring stages
    exchanged_bytes: int | None  # to other replicas of the stage; None where DeepSpeed averages gradients
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
        return {name: now - self._before[1][name] for name, now in totals.items()} | {"slowest_link": slowest}

    def _totals(self, replicas: Any) -> tuple[list[float], dict[str, float]]:
        waits = [0.0 if end is None else end.waited for end in self._ends]
        return waits, {
            "waited": sum(waits) + replicas.waited,
            "sent_bytes": sum(end.num_bytes for end in self._ends if isinstance(end, Sender)),
            "exchanged_bytes": replicas.num_bytes,
        }


Listener = Callable[[list[SegmentReport]], None]


class Reports:
    """Collects the figures of all segments on rank 0. A part of the engine; making one is a collective call.

    Args:
        num_segments, segments_per_stage: of the model.
        every: report every so many optimizer steps; None: only when flushed.
        source: global rank of the last stage of replica 0.
        local_segments: this rank's segments, empty on replicas other than the first.
        links: names of all links; "slowest_link" is a number of one of them.
    """

    def __init__(
        self, num_segments: int, segments_per_stage: int, every: int | None, source: int, local_segments: range,
        links: Sequence[str],
    ) -> None:  # fmt: skip
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
        self._mailbox = Mailbox(group, 0, (num_segments, len(FIGURES))) if self._reads or self._writes else None

    def close_step(self, rows: dict[int, dict[str, Any]]) -> None:
        """Book this rank's figures of the step that ends, and pass on those of the step before, which are complete by now."""
        if self._mailbox is not None:
            step = self.figures[0, 0].item()
            if self._writes and self._every and not math.isnan(step) and step % self._every == 0:
                self._mailbox.write(self.figures)
            if self._reads:
                self._emit(self._mailbox.read())
        for segment, row in rows.items():
            self.figures[segment] = torch.tensor(
                [math.nan if row[f] is None else float(row[f]) for f in FIGURES], dtype=torch.float64
            )

    def flush(self) -> None:
        """Bring the reports up to the last step. A collective call over all ranks: stages meet here."""
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
        figures = {name: None if math.isnan(value) else value for name, value in zip(FIGURES, row, strict=True)}
        seconds, waited = figures["seconds"] or 0.0, figures["waited"] or 0.0
        return SegmentReport(
            int(figures["step"] or 0), segment, segment // self._per_stage, figures["loss"], figures["grad_norm"],
            seconds, waited / seconds if seconds else 0.0, int(figures["sent_bytes"] or 0),
            None if figures["exchanged_bytes"] is None else int(figures["exchanged_bytes"]),
            None if figures["slowest_link"] is None else self._links[int(figures["slowest_link"])],
        )  # fmt: skip


def monitor_listener(monitor: Any, samples_per_step: int) -> Listener:
    """Writes every report to DeepSpeed's monitor, with tags per stage and segment."""

    def write(reports: list[SegmentReport]) -> None:
        events = []
        for r in reports:
            tag, samples = f"Train/stage_{r.stage}/segment_{r.segment}", r.step * samples_per_step
            events += [
                (f"{tag}/{name}", value, samples)
                for name, value in (("loss", r.loss), ("grad_norm", r.grad_norm), ("idle_share", r.idle_share))
                if value is not None
            ]
        if reports[-1].loss is not None:
            events.append(("Train/Samples/train_loss", reports[-1].loss, reports[-1].step * samples_per_step))
        monitor.write_events(events)

    return write


class MetricsFile:
    """metrics.jsonl: one object a line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def read(self) -> list[dict[str, Any]]:
        """All rows; a last line that a killed run left half-written is dropped."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def keep_until(self, step: int) -> float:
        """Drop what a run wrote after the step it resumes from; returns the seconds it had trained by then."""
        rows = [row for row in self.read() if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return max((row["seconds"] for row in rows), default=0.0)


def summary_table(rows: list[dict[str, Any]]) -> str:
    """What came of a run, from the rows of metrics.jsonl: last validation loss and idle share per segment, throughput."""
    train = [row for row in rows if row["split"] == "train"]
    validation = {row["segment"]: row["loss"] for row in rows if row["split"] == "validation"}
    lines = ["segment  stage  validation loss  perplexity  idle share"]
    for segment, stage in sorted({(row["segment"], row["stage"]) for row in train}):
        # the first report pays for the start
        own = [row for row in train if row["segment"] == segment][1:]
        seconds = sum(row["step_seconds"] for row in own)
        idle = f"{sum(row['idle_share'] * row['step_seconds'] for row in own) / seconds:>10.1%}" if seconds else f"{'-':>10}"
        loss = validation.get(segment)
        figures = f"{loss:>15.4f}  {math.exp(loss):>10.2f}" if loss is not None else f"{'-':>15}  {'-':>10}"
        lines.append(f"{segment:>7}  {stage:>5}  {figures}  {idle}")
    if train and train[-1]["seconds"] > train[0]["seconds"]:
        speed = (train[-1]["tokens"] - train[0]["tokens"]) / (train[-1]["seconds"] - train[0]["seconds"])
        lines.append(f"{train[-1]['step']} steps, {train[-1]['tokens']:,} tokens, {speed:,.0f} tokens/s")
    return "\n".join(lines)


def draw_losses(metrics: str | Path, picture: str | Path) -> None:
    """Loss curves of every segment: training thin, validation with dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in MetricsFile(metrics).read() if row["loss"] is not None]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for segment in sorted({row["segment"] for row in rows}):
        for split, style in (("train", {"linewidth": 0.9, "alpha": 0.6}), ("validation", {"marker": "o", "markersize": 4})):
            points = [(row["tokens"], row["loss"]) for row in rows if row["segment"] == segment and row["split"] == split]
            if points:
                axis.plot(*zip(*points, strict=True), color=f"C{segment % 10}", label=f"segment {segment}, {split}", **style)
    axis.set_xlabel("tokens")
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def draw_diagnostics(metrics: str | Path, picture: str | Path) -> None:
    """Gradient cosine, activation norm and effective rank of every segment over the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in MetricsFile(metrics).read() if row["split"] == "diagnostics"]
    names = [name for name in (rows[0] if rows else ()) if name.startswith(("gradient_", "activation_"))]
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(11, 3.2), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        for segment in sorted({row["segment"] for row in rows}):
            points = [(row["tokens"], row[name]) for row in rows if row["segment"] == segment]
            axis.plot(*zip(*points, strict=True), marker=".", color=f"C{segment % 10}", label=f"segment {segment}")
        axis.set_xlabel("tokens")
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
