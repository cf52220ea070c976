"""The tables of the quality study, in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ds_local.outputs import write_file
from ds_local.study.methods import shown
from ds_local.study.picture import LARGE, SMALL, compared
from ds_local.study.recipes import PRESETS

Row = dict[str, Any]  # of quality.json
START, END = "<!-- written by scripts/study.py table, from here -->", "<!-- to here -->"

CONDITIONS = ("M=4, c/F=0", "M=8, c/F=0", "M=4, c/F=1", "M=8, c/F=1")

PREAMBLE = """
Each table from `python scripts/study.py run --preset PRESET ...`, all of them then by `python
scripts/study.py table`. The gap is in perplexity, to the backprop runs of the same steps and seeds;
each method has the best of the learning rates tried. The auxiliary share is of the busiest stage's
FLOPs; times are simulated, one segment a stage, for the whole run, against balanced 1F1B with equal
steps, for M micro-batches a step; on slow links a message takes as long as a forward, for 1F1B too.
Split is the same with `"split_backward": 2`. The time to equal loss is the method's time by that
which 1F1B needs for a backprop run that ends with the method's loss, of those seeds that have whole
backprop runs of other lengths. The last column is the time, at M = 4 and 8, until the loss is down
at the last of the backprop runs of equal steps. A dash is what is not known, or not simulated: the
first part of the control that trains the first chunk alone. Where it is cut changes nothing of a
backprop run, so one serves for every K.
"""


def short_markdown(rows: Sequence[Row]) -> str:
    """What is compared in the chart, as a table for each size of steps."""
    lines: list[str] = []
    for setting in (SMALL, LARGE):
        known = compared(rows, setting)
        if not known:
            continue
        facts = PRESETS[setting[0]]
        lines += [
            *([""] if lines else []),
            f"**Steps of {facts.step_tokens:,} tokens, {facts.steps * setting[1]:,.0f} of them:**",
            "",
            "| method | seeds | perplexity gap (lowest to highest) | time, 4 micro-batches | 8 "
            "| 4, slow links | 8, slow links |",
            "|" + 7 * "---|",
            *map(_short_line, known.values()),
        ]
    return "\n".join(lines) + "\n"


def _short_line(row: Row) -> str:
    times = row["time_to_equal_loss_split"]
    gaps = row["gaps_percent"]
    spread = f" ({min(gaps):+.1f} to {max(gaps):+.1f})" if len(gaps) > 1 and any(gaps) else ""
    cells = [
        shown(row["method"]),
        row["seeds"],
        f"{row['gap_percent']:+.1f} %{spread}",
        *(f"{times[condition]:.2f}" if times else "-" for condition in CONDITIONS),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown(rows_of: Mapping[str, list[Row]]) -> str:
    """A table for each preset."""
    lines = _wrapped(PREAMBLE)
    for preset, rows in rows_of.items():
        facts, first = PRESETS[preset], rows[0]
        model = facts.model
        lines += [
            "",
            f"### Preset {preset}: steps of {facts.step_tokens:,} tokens",
            "",
            *_wrapped(
                f"{model['n_layer']} blocks of width {model['n_embd']}, "
                f"{first['parameters']:,} parameters, {first['processor']} {first['device']}."
            ),
            "",
            "| method | K | steps | rate | seeds | loss (lowest-highest) | perplexity | gap "
            "| auxiliary share | time, M = 4 / 8 / 16, slow 4 / 8 | split "
            "| time to equal loss, M = 4 / 8, slow 4 / 8 | split | to backprop's last loss |",
            "|" + 14 * "---|",
            *(_line(row, round(facts.steps * row["step_factor"])) for row in rows),
        ]
    return "\n".join(lines) + "\n"


def ratio_markdown(rows_of: Mapping[str, list[Row]]) -> str:
    """Losses and gaps alone, a table for each preset."""
    lines: list[str] = []
    for preset, rows in rows_of.items():
        facts = PRESETS[preset]
        width, vocabulary = facts.model["n_embd"], facts.model["vocab_size"]
        lines += [
            *([""] if lines else []),
            f"### Preset {preset}: vocabulary / width {vocabulary // width}",
            "",
            *_wrapped(
                f"{facts.model['n_layer']} blocks of width {width}, vocabulary {vocabulary:,}, "
                f"{rows[0]['parameters']:,} parameters; steps of {facts.step_tokens:,} tokens, "
                f"rate {facts.learning_rate:g}; {rows[0]['processor']} {rows[0]['device']}."
            ),
            "",
            "| method | steps | seeds | loss of the model | loss of its lowest exit | gap in nats "
            "| gap in perplexity |",
            "|" + 7 * "---|",
            *(_ratio_line(row, round(facts.steps * row["step_factor"])) for row in rows),
        ]
        for length in sorted({r["step_factor"] for r in rows if r["depth_pays"] is False}):
            lines += [
                "",
                *_wrapped(
                    f"**With {round(facts.steps * length):,} steps depth does not pay yet**: "
                    "a lower exit ends below backpropagation, so these gaps are no ranking."
                ),
            ]
    return "\n".join(lines) + "\n"


def _ratio_line(row: Row, steps: int) -> str:
    lowest = row["exits"].get(min(row["exits"], key=int, default=""))
    has_exit = len(row["exits"]) > 1
    cells = [
        f"{shown(row['method'])}, K = {row['segments']}",
        f"{steps:,}",
        row["seeds"],
        f"{mean(row['losses']):.4f}",
        f"{lowest:.4f}" if has_exit else "-",
        f"{row['gap_nats']:+.4f}",
        f"{row['gap_percent']:+.1f} %",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text.strip(), width=128, break_on_hyphens=False)


def _line(row: Row, steps: int) -> str:
    losses = row["losses"]

    def times(field: str, *counts: int, slow: tuple[int, ...] = (4, 8)) -> str:
        of = row[field]
        if not of:
            return "-"
        groups = [
            [f"{of[f'M={m}, c/F={c}']:.2f}" for m in group]
            for c, group in enumerate((counts, slow))
            if group
        ]
        return ", ".join(" / ".join(group) for group in groups)

    spread = f" ({min(losses):.4f}-{max(losses):.4f})" if len(losses) > 1 else ""
    cells = [
        shown(row["method"]),
        row["segments"],
        f"{steps:,}",
        f"{row['learning_rate']:g}",
        row["seeds"],
        f"{mean(losses):.4f}{spread}",
        f"{row['perplexity']:.3f}",
        f"{row['gap_percent']:+.1f} %",
        f"{row['aux_flops_share']:.1%}",
        *(times(f"predicted_time_ratios{split}", 4, 8, 16) for split in ("", "_split")),
        *(times(f"time_to_equal_loss{split}", 4, 8) for split in ("", "_split")),
        times("predicted_time_to_backprop_loss", 4, 8, slow=()),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def write_between(page: Path, text: str) -> None:
    """Replace what is between the two marks of a page."""
    whole = page.read_text() if page.exists() else f"# Quality at equal tokens\n\n{START}\n{END}\n"
    before, _, rest = whole.partition(START)
    write_file(page, f"{before}{START}\n{text}{END}{rest.partition(END)[2]}")
