"""What came of a run: a table for the console, loss curves and diagnostics as pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ds_local.checkpoints.metrics_file import MetricsFile


def summary_table(rows: list[dict[str, Any]]) -> str:
    """What came of a run, from the rows of metrics.jsonl: last validation loss and idle share per
    segment, throughput."""
    train = [row for row in rows if row["split"] == "train"]
    validation = {row["segment"]: row["loss"] for row in rows if row["split"] == "validation"}
    lines = ["segment  stage  validation loss  perplexity  idle share"]
    for segment, stage in sorted({(row["segment"], row["stage"]) for row in train}):
        # the first report pays for the start
        own = [row for row in train if row["segment"] == segment][1:]
        seconds = sum(row["step_seconds"] for row in own)
        idle = (
            f"{sum(row['idle_share'] * row['step_seconds'] for row in own) / seconds:>10.1%}"
            if seconds
            else f"{'-':>10}"
        )
        loss = validation.get(segment)
        figures = (
            f"{loss:>15.4f}  {math.exp(loss):>10.2f}"
            if loss is not None
            else f"{'-':>15}  {'-':>10}"
        )
        lines.append(f"{segment:>7}  {stage:>5}  {figures}  {idle}")
    if train and train[-1]["seconds"] > train[0]["seconds"]:
        speed = (train[-1]["tokens"] - train[0]["tokens"]) / (
            train[-1]["seconds"] - train[0]["seconds"]
        )
        lines.append(
            f"{train[-1]['step']} steps, {train[-1]['tokens']:,} tokens, {speed:,.0f} tokens/s"
        )
    return "\n".join(lines)


def draw_losses(metrics: str | Path, picture: str | Path) -> None:
    """Loss curves of every segment: training thin, validation with dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in MetricsFile(metrics).read() if row["loss"] is not None]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for segment in sorted({row["segment"] for row in rows}):
        for split, style in (
            ("train", {"linewidth": 0.9, "alpha": 0.6}),
            ("validation", {"marker": "o", "markersize": 4}),
        ):
            points = [
                (row["tokens"], row["loss"])
                for row in rows
                if row["segment"] == segment and row["split"] == split
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=f"C{segment % 10}",
                    label=f"segment {segment}, {split}",
                    **style,
                )
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
    names = [
        name for name in (rows[0] if rows else ()) if name.startswith(("gradient_", "activation_"))
    ]
    figure, axes = plt.subplots(
        1, max(1, len(names)), figsize=(11, 3.2), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=False):
        for segment in sorted({row["segment"] for row in rows}):
            points = [(row["tokens"], row[name]) for row in rows if row["segment"] == segment]
            axis.plot(
                *zip(*points, strict=True),
                marker=".",
                color=f"C{segment % 10}",
                label=f"segment {segment}",
            )
        axis.set_xlabel("tokens")
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
