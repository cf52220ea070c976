"""A row for each method of the quality study: losses, gaps, predicted times."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ds_local.model.families import load_model_config, skeleton
from ds_local.study.forecast import Prediction, Times, predict, ratios_of
from ds_local.study.methods import METHODS
from ds_local.study.recipes import PRESETS, Preset
from ds_local.study.results import (
    YARDSTICKS,
    best_rate,
    depth_pays,
    gaps_to,
    percent,
    runs_of,
    time_for_the_loss,
    tokens_to,
)

Losses = dict[int, dict[float, float]]  # of backprop: seed -> step factor -> loss


def summary(preset: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method, number of segments and number of steps; none without a backprop run
    under the same schedule to compare with."""
    return [row for schedule in YARDSTICKS for row in _rows_under(schedule, preset, results)]


def _rows_under(schedule: str, preset: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    yardstick, known = YARDSTICKS[schedule], (r for r in results if r["method"] in METHODS)
    results = [r for r in known if METHODS[r["method"]].schedule == schedule]
    losses = _losses_of([r for r in results if r["method"] == yardstick])
    lengths = {steps for whole in losses.values() for steps in whole}
    kinds = {(r["method"], r["segments"], r["step_factor"]) for r in results}
    kinds |= {(yardstick, k, steps) for _, k, steps in kinds if steps in lengths}
    rows = []
    for method, segments, steps in sorted(kinds, key=_place):
        runs = runs_of(results, method, segments, steps)
        gaps = gaps_to({seed: whole.get(steps) for seed, whole in losses.items()}, runs)
        if not gaps:
            print(
                f"{method} is left out: {yardstick} has no run of as many steps with a seed that "
                "it has",
                file=sys.stderr,
            )
            continue
        pays = depth_pays(results, losses, steps)
        rows.append(_row(PRESETS[preset], runs, segments, gaps, losses) | {"depth_pays": pays})
    return rows


def _losses_of(backprop: list[dict[str, Any]]) -> Losses:
    losses: Losses = {}
    for steps in {r["step_factor"] for r in backprop}:
        for run in best_rate([r for r in backprop if r["step_factor"] == steps]):
            losses.setdefault(run["seed"], {})[steps] = run["loss"]
    return losses


def _place(kind: tuple[str, int, float]) -> tuple[Any, ...]:
    """Of a row in the table."""
    return list(METHODS).index(kind[0]), *kind[1:]


def _row(
    facts: Preset, runs: list[dict[str, Any]], segments: int, gaps: list[float], losses: Losses
) -> dict[str, Any]:
    """What is known of the runs of one method, number of segments and number of steps."""
    first, loss, gap = runs[0], mean(r["loss"] for r in runs), mean(gaps)
    method, steps = METHODS[first["method"]], first["step_factor"]
    # no pipeline in the first part of those that are renewed: no time to predict
    forecast = Prediction(0.0, {}, {})
    if not method.renew:
        forecast = predict(facts.model, method, segments, facts.model["n_positions"])
    needed = tokens_to(loss - gap, runs)
    to_last_loss = None if needed is None else ratios_of(forecast.time, needed)
    equal = [time_for_the_loss(r["loss"], losses.get(r["seed"], {})) for r in runs]
    times = [time for time in equal if time is not None]

    def to_equal_loss(ratios: Times) -> dict[str, float] | None:
        return ratios_of(ratios, steps / mean(times)) if times else None

    return {
        "preset": first["preset"],
        "method": first["method"],
        "segments": segments,
        "parameters": _parameters(facts.model),
        "tokens": first["tokens"],
        "step_factor": steps,
        "seeds": len(runs),
        "perplexity": round(math.exp(loss), 4),
        "gap_percent": percent(gap),
        "gap_nats": round(gap, 4),
        "gaps_percent": [percent(one) for one in gaps],
        "schedule": method.schedule,
        "depth_pays": None,
        "exits": _exits(runs) if method.has_exits else {},
        "aux_flops_share": round(forecast.aux_share, 4),
        "predicted_time_ratio": ratios_of(forecast.time).get("M=8, c/F=0"),
        "device": first["machine"]["device"],
        "processor": first["machine"]["processor"],
        "predicted_time_to_backprop_loss": to_last_loss,
        "learning_rate": facts.learning_rate * first["lr_factor"],
        "losses": [round(r["loss"], 4) for r in runs],
        "predicted_time_ratios": ratios_of(forecast.time),
        "predicted_time_ratios_split": ratios_of(forecast.split),
        "tokens_to_equal_loss": round(steps / mean(times), 4) if times else None,
        "time_to_equal_loss": to_equal_loss(forecast.time),
        "time_to_equal_loss_split": to_equal_loss(forecast.split),
    }


def _exits(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Segment -> mean loss after it, of the runs that have kept them."""
    kept = [run["exits"] for run in runs if run.get("exits")]
    return {segment: mean(one[segment] for one in kept) for segment in (kept[0] if kept else ())}


def _parameters(model: dict[str, Any]) -> int:
    return sum(p.numel() for p in skeleton(load_model_config(dict(model))).parameters())
