"""What came of a run: a table for the console, loss curves and diagnostics as pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ds_local.checkpoints.metrics_file import MetricsFile, not_finite, perplexity
from ds_local.outputs import new_file


def summary_table(rows: list[dict[str, Any]]) -> str:
    """What came of a run, from the rows of metrics.jsonl: last validation loss and idle share per
    segment, throughput, and the steps that were not finite."""
    train = [row for row in rows if row["split"] == "train"]
    validation = {row["segment"]: row for row in rows if row["split"] == "validation"}
    lines = ["segment  stage  validation loss  perplexity  idle share  skipped"]
    newest = max((row["step"] for row in train), default=0)  # before it there may be other stages
    now = {(row["segment"], row["stage"]) for row in train if row["step"] == newest}
    for segment, stage in sorted(now):
        mine = [row for row in train if row["segment"] == segment]
        own = mine[1:]  # the first report pays for the start
        seconds = sum(map(_seconds, own))
        waited = sum((row.get("idle_share") or 0.0) * _seconds(row) for row in own)
        idle = f"{waited / seconds:.1%}" if seconds else "-"
        loss, perplexity = _loss_words(validation.get(segment))
        skipped = mine[-1].get("skipped", 0)
        lines.append(
            f"{segment:>7}  {stage:>5}  {loss:>15}  {perplexity:>10}  {idle:>10}  {skipped:>7}"
        )
    lines += [
        f"not finite: {row['nonfinite']} of segment {row['segment']} (stage {row['stage']}) at "
        f"step {row['nonfinite_step']}"
        for row in not_finite(rows)[-_LISTED:]
    ]
    if train:
        last, speed = train[-1], tokens_per_second(train)
        lines.append(f"{last['step']} steps, {last['tokens']:,} tokens, {speed:,.0f} tokens/s")
    return "\n".join(lines)


def tokens_per_second(rows: list[dict[str, Any]]) -> float:
    """The pace of the slowest stage in the steps of `rows`, the first left out, which pays for the
    start. Saves and validations do not count."""
    first, last = rows[0]["step"], rows[-1]
    seconds: defaultdict[int, float] = defaultdict(float)
    steps: Counter[int] = Counter()
    for row in rows:
        if row["step"] > first or last["step"] == first:
            seconds[row["segment"]] += _seconds(row)
            steps[row["segment"]] += 1
    slowest = max(seconds[segment] / steps[segment] for segment in seconds)
    return last["tokens"] / last["step"] / max(slowest, 1e-9)


_LISTED = 20  # events in a summary


def _loss_words(row: dict[str, Any] | None) -> tuple[str, str]:
    """(loss, perplexity) of a validation row, if there is one."""
    if row is None:
        return "-", "-"
    if row["loss"] is None:
        return "not finite", "-"
    return f"{row['loss']:.4f}", f"{perplexity(row['loss']):.2f}"


def _seconds(row: dict[str, Any]) -> float:
    """Length of the step, which older runs do not say."""
    return row.get("step_seconds") or 0.0


def draw_losses(metrics: str | Path, picture: str | Path) -> None:
    """Loss curves of every segment: training thin, validation with dots; steps that were not finite
    as crosses at the bottom."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    everything = MetricsFile(metrics).read()
    rows = [row for row in everything if row["loss"] is not None]
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
    events = not_finite(everything)
    for segment in sorted({row["segment"] for row in events}):
        steps = [row for row in events if row["segment"] == segment]
        axis.plot(
            [row["tokens"] * row["nonfinite_step"] / max(row["step"], 1) for row in steps],
            [0.02] * len(steps),
            "x",
            transform=axis.get_xaxis_transform(),
            color=f"C{segment % 10}",
            label=f"segment {segment}, not finite",
        )
    axis.set_xlabel("tokens")
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with new_file(picture) as scratch:
        figure.savefig(scratch, dpi=130)
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
            points = [(row["tokens"], row.get(name)) for row in rows if row["segment"] == segment]
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
    with new_file(picture) as scratch:
        figure.savefig(scratch, dpi=130)
    plt.close(figure)
