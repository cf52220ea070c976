"""Runs systems against each other: every repetition takes each system once, so that whatever else
the machine does hits all."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ds_local.measure import emulated, sleeping
from ds_local.measure.network import Shape
from ds_local.measure.ranks import Pool
from ds_local.measure.systems import System, with_head

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One point of a sweep."""

    stages: int
    micro_batches: int
    times: sleeping.Times
    link: Shape

    @property
    def link_seconds(self) -> float:
        """That a message keeps a link busy."""
        return (
            self.times.floats * 32 / self.link.bits_per_second if self.link.bits_per_second else 0.0
        )

    @property
    def ideal_seconds(self) -> float:
        """Of a step: every stage always busy with useful work."""
        return self.micro_batches * self.times.useful

    def steps(self) -> tuple[int, int]:
        """(steps until the pipeline has filled, steps that count)."""
        return math.ceil(self.stages / self.micro_batches) + 1, max(
            2, math.ceil(12 / self.micro_batches)
        )


def sweep(
    settings: Sequence[Setting],
    systems: Sequence[System],
    repeats: int,
    pool: Pool,
    trace: Callable[..., None] | None = None,
) -> Iterator[list[Row]]:
    """The rows of one setting after another."""
    pool.run(ready, max(setting.stages for setting in settings), timeout=600)
    for setting in settings:
        able = [s for s in systems if _reason_against(s, setting) is None]
        seen: dict[str, list[list[Row]]] = {system.name: [] for system in able}
        periods: dict[str, list[float]] = {system.name: [] for system in able}
        load = os.getloadavg()[0]
        for repeat in range(repeats):
            for system in able:
                started = time.monotonic()
                results = run_once(system, setting, pool)
                seen[system.name].append(results)
                periods[system.name].append(emulated.period(results, setting.steps()[0]))
                share = setting.ideal_seconds / periods[system.name][-1]
                shape = f"P={setting.stages} M={setting.micro_batches}"
                where = f"{shape} {_link_words(setting)}{system.name}"
                took = time.monotonic() - started
                print(
                    f"{where}, repetition {repeat + 1}: {share:.1%} of ideal ({took:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
                if trace is not None and not repeat:
                    trace(system, setting, results)
        yield [
            _row(system, setting, seen[system.name], periods[system.name], load) for system in able
        ]


def ready() -> None:
    """Imports of the ranks happen in here, not in what is measured."""


def _reason_against(system: System, setting: Setting) -> str | None:
    reason = system.refuses(setting.stages, setting.micro_batches)
    if reason:
        print(f"left out: {reason}", file=sys.stderr)
    return reason


def run_once(system: System, setting: Setting, pool: Pool) -> list[Row]:
    """What each rank saw."""
    warm, counted = setting.steps()
    # nothing is slower than one micro-batch after the other over these links
    slowest = setting.stages * (
        setting.times.useful * 1.5 + 2 * setting.link_seconds + 2 * setting.link.delay_seconds
    )
    limit = 300 + 3 * (warm + counted) * setting.micro_batches * slowest
    arguments = setting.stages, setting.micro_batches, warm + counted, setting.link
    times = with_head(setting.times, system)
    extra = system.arguments(setting.stages, setting.micro_batches)
    return pool.run(system.run, setting.stages, times, *arguments, *extra, timeout=limit)


def _row(
    system: System, setting: Setting, seen: list[list[Row]], periods: list[float], load: float
) -> Row:
    """The contract: efficiency is the useful time of the busiest stage over the time of a step."""
    timeline = system.predicted(
        setting.times, setting.stages, setting.micro_batches, setting.link_seconds, seen[0][0]
    )
    seconds = median(periods)
    efficiencies = [setting.ideal_seconds / period for period in periods]
    row = {
        "system": system.owner,
        "schedule": system.schedule,
        "stages": setting.stages,
        "micro_batches": setting.micro_batches,
        "link": {
            "c_over_f": round(setting.link_seconds / setting.times.forward, 3)
            if setting.times.forward
            else 0.0,
            "bits_per_second": setting.link.bits_per_second,
            "delay_seconds": setting.link.delay_seconds,
        },
        "head_share": system.head,
        "efficiency": setting.ideal_seconds / seconds,
        "efficiency_lowest": min(efficiencies),
        "efficiency_highest": max(efficiencies),
        "step_seconds": seconds,
        "repetitions": periods,
        "simulated_efficiency": _simulated(system, setting, timeline),
        "peak_live_micro_batches": _live(system, setting, timeline),
        "load_before": load,
    }
    if setting.times.layers:
        row |= _memory(seen)
    return row


def _simulated(system: System, setting: Setting, timeline: Any) -> float | None:
    if setting.link.delay_seconds:  # the simulator's links are slow, not long
        return None
    if timeline is not None:
        return setting.ideal_seconds / timeline.steady_period
    return 1.0 if not system.flushes and not setting.link_seconds else None


def _live(system: System, setting: Setting, timeline: Any) -> list[float] | None:
    if timeline is not None:
        return [count / system.pieces for count in timeline.schedule.peak_live]
    return None if system.flushes else [setting.stages - stage for stage in range(setting.stages)]


def _memory(seen: list[list[Row]]) -> Row:
    """Medians over the repetitions, for each stage."""

    def over(key: str) -> list[Any]:
        values = [[rank.get(key) or 0 for rank in results] for results in seen]
        return [median(column) for column in zip(*values, strict=True)]

    unit = seen[0][0]["unit_bytes"]
    return {
        "live_bytes": over("live_bytes"),
        "micro_batch_bytes": unit,
        "rss_growth_bytes": over("rss_bytes"),
        "posted_receive_bytes": over("posted_bytes"),
        "peak_live_micro_batches": [n / unit for n in over("live_bytes")],
    }


def _link_words(setting: Setting) -> str:
    ratio = f"c/F={setting.link_seconds / setting.times.forward:g} " if setting.link_seconds else ""
    return ratio + (
        f"delay {setting.link.delay_seconds * 1000:g} ms " if setting.link.delay_seconds else ""
    )
