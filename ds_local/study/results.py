"""The finished runs, and what can be read from them: rates, gaps, equal losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from ds_local.config import strict_json
from ds_local.errors import DataError
from ds_local.outputs import write_file
from ds_local.study.methods import COSINE, METHODS, WSD
from ds_local.study.recipes import TRIAL
from ds_local.study.runs import Run

YARDSTICKS = {COSINE: "backprop", WSD: "backprop, WSD"}  # what a row's gap is to
NEAR = 1.5  # ratio of two runs' steps up to which a line between them is right to about 1 %


def all_runs(kept: Path, folder: Path) -> list[dict[str, Any]]:
    """The results kept in a file of one line each, and those finished in a folder, which are added
    to it but for trials.

    Raises:
        DataError: where results of a preset are of different texts, so that their losses cannot be
            compared.
    """
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    results += [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/result.json"))]
    latest = {
        tuple(result[field] for field in Run._fields): result
        for result in results
        if result["preset"] != TRIAL
    }
    runs = [latest[identity] for identity in sorted(latest)]
    for preset in dict.fromkeys(run["preset"] for run in runs):
        texts = {run.get("data") for run in runs if run["preset"] == preset}
        if len(texts) > 1:
            names = ", ".join(sorted(str(text)[:12] for text in texts))
            raise DataError(
                f"runs of {preset} in {kept} and {folder} are of different data ({names}: the "
                "fingerprints), so their losses cannot be compared; keep those of one"
            )
    write_file(kept, "".join(strict_json.dumps(run) + "\n" for run in runs))
    return runs


def best_rate(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at the learning rate with the lowest mean loss over the seeds that were tried at
    every rate."""
    rates = sorted({r["lr_factor"] for r in results})
    common = set.intersection(
        *({r["seed"] for r in results if r["lr_factor"] == rate} for rate in rates)
    )
    runs_at = [[r for r in results if r["lr_factor"] == rate] for rate in rates]
    return min(
        runs_at, key=lambda runs: mean(r["loss"] for r in runs if r["seed"] in common or not common)
    )


def runs_of(
    results: list[dict[str, Any]], method: str, segments: int, step_factor: float
) -> list[dict[str, Any]]:
    """The runs of a row, at its best rate. One of backprop serves for every number of segments."""
    return best_rate(
        [
            r
            for r in results
            if (r["method"], r["step_factor"]) == (method, step_factor)
            and (r["segments"] == segments or method in YARDSTICKS.values())
        ]
    )


def gaps_to(yardsticks: Mapping[int, float | None], runs: list[dict[str, Any]]) -> list[float]:
    """Difference in loss to a yardstick (seed -> loss), of every seed that both have."""
    return [run["loss"] - loss for run in runs if (loss := yardsticks.get(run["seed"])) is not None]


def depth_pays(
    results: list[dict[str, Any]], yardsticks: Mapping[int, Mapping[float, float]], longer: float
) -> bool | None:
    """Does backprop end below every lower exit of the runs of this length? None if none is known.

    Where it does not, a shorter model would have done as well, and gaps say nothing about depth.
    """
    pairs = [
        (loss, yardsticks[run["seed"]][longer])
        for run in results
        if run["step_factor"] == longer and METHODS[run["method"]].has_exits
        for segment, loss in run.get("exits", {}).items()
        if int(segment) < run["segments"] - 1 and longer in yardsticks.get(run["seed"], {})
    ]
    return all(exit_loss > whole for exit_loss, whole in pairs) if pairs else None


def tokens_to(loss: float, runs: list[dict[str, Any]]) -> float | None:
    """Share of a run's tokens after which its mean validation curve is down at a loss; None if it
    never is."""
    longest = max(len(run["curve"]) for run in runs)  # of a few runs only the end was kept
    curves = [run["curve"] for run in runs if len(run["curve"]) == longest]
    points = [
        (tokens[0][0], mean(value for _, value in tokens)) for tokens in zip(*curves, strict=True)
    ]
    for (before, high), (after, low) in pairwise(points):
        if low <= loss < high:
            return (before + (after - before) * (high - loss) / (high - low)) / points[-1][0]
    return None


def time_for_the_loss(loss: float, yardsticks: Mapping[float, float]) -> float | None:
    """How many times the preset's steps backprop needs to end with this loss, from its whole runs
    (step factor -> loss).

    Between two of them, if they are near enough, the loss is a line over the logarithm of the
    steps. A whole run has cooled its learning rate down, as the run it is compared with has: a
    point of a longer run's curve has not.
    """
    for (shorter, high), (longer, low) in pairwise(sorted(yardsticks.items())):
        if low <= loss <= high and longer <= NEAR * shorter:
            return shorter * (longer / shorter) ** ((high - loss) / (high - low))
    return None


def percent(gap: float | None) -> float | None:
    """A difference in loss as one in perplexity, in %."""
    return None if gap is None else round(100 * math.expm1(gap), 2)
