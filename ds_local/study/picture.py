"""The curves of the quality study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_local.outputs import new_file
from ds_local.study.recipes import PRESETS
from ds_local.study.results import runs_of

SHOWN = (
    "backprop",
    "local",
    "mixed 1/4",
    "mixed 1/4, tail 20 %",
    "chunked 2",
    "chunked 2, backprop tail 40 %",
    "interlocking 2",
    "chunked 2, last 40 % half corrected",
)


def draw(
    results: list[dict[str, Any]], rows_of: Mapping[str, list[dict[str, Any]]], picture: Path
) -> None:
    """Validation loss against tokens, and against predicted time: a line of panels for each preset,
    its most compared length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(rows_of),
        2,
        figsize=(11, 4.2 * len(rows_of)),
        layout="constrained",
        sharey="row",
        squeeze=False,
    )
    for axes, (preset, rows) in zip(panels, rows_of.items(), strict=True):
        shown = [row for row in rows if row["segments"] == 4 and row["method"] in SHOWN]
        lengths = [row["step_factor"] for row in shown]
        length = max(lengths, key=lambda factor: (lengths.count(factor), factor))
        for row in (row for row in shown if row["step_factor"] == length):
            runs = runs_of([r for r in results if r["preset"] == preset], row["method"], 4, length)
            run = max(runs, key=lambda r: len(r["curve"]))  # of a few runs only the end was kept
            seen, losses = zip(*run["curve"], strict=True)
            for axis, scale in zip(
                axes, (1.0, row["predicted_time_ratios_split"]["M=4, c/F=0"]), strict=True
            ):
                axis.plot(
                    [tokens * scale / 1e6 for tokens in seen],
                    losses,
                    marker=".",
                    color=f"C{SHOWN.index(row['method'])}",
                    label=row["method"],
                )
        tokens = PRESETS[preset].step_tokens
        axes[0].set_ylabel(f"validation loss (nats), {tokens:,} tokens a step")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.set_ylim(top=min(axis.get_ylim()[1], 3.0))
        axes[0].legend(fontsize=8)
    panels[-1][0].set_xlabel("million tokens")
    panels[-1][1].set_xlabel("time for P = M = 4, split backward (1F1B: 1 per million tokens)")
    with new_file(picture) as scratch:
        figure.savefig(scratch, dpi=130)
    plt.close(figure)
