"""How long a method would take on a pipeline, beside balanced 1F1B: simulated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ds_local.config.files import local_parallel
from ds_local.config.schema import LocalParallelConfig
from ds_local.model.families import load_model_config
from ds_local.model.flops import auxiliary_shares, choose_parts, segment_times, unit_flops
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.simulator import Costs, simulate
from ds_local.study.methods import METHODS, Method, section_of

_STEPS = 1000  # of a run that is simulated
Times = dict[tuple[int, int], float]  # (micro-batches, c/F) -> time against balanced 1F1B


class Prediction(NamedTuple):
    aux_share: float  # of the FLOPs of the busiest stage
    time: Times  # of the run
    split: Times  # the same with a split backward, where forwards that run ahead leave time for it


def predict(model: dict[str, Any], method: Method, num_segments: int, seq_len: int) -> Prediction:
    """One segment on each of as many stages, each method with boundaries of its own."""
    config = load_model_config(dict(model))
    prediction = Prediction(0.0, {}, {})
    mixes = "mix" in {**method.scheme, **method.end}  # of two micro-batches at least
    for count in (4, 8, 16) if mixes else (1, 4, 8, 16):
        yardstick, _ = _forecast(config, METHODS["backprop"], num_segments, count, seq_len, 0)
        deferral = 0 if method.scheme.get("run_ahead") else 2
        for ratios, split_backward in ((prediction.time, 0), (prediction.split, deferral)):
            times, shares = _forecast(config, method, num_segments, count, seq_len, split_backward)
            ratios |= {(count, link): times[link] / yardstick[link] for link in times}
        if count == 8:
            prediction = prediction._replace(aux_share=max(shares))
    return prediction


def _forecast(
    config: Any, method: Method, num_segments: int, count: int, seq_len: int, split_backward: int
) -> tuple[dict[int, float], list[float]]:
    """(c/F -> time of a run whose steps have `count` micro-batches, auxiliary share of each stage
    in the first step)."""
    # one segment on each stage
    layout = {"num_stages": num_segments, "segments_per_stage": 1, "split_backward": split_backward}
    given = {**section_of(method, num_segments, count, _STEPS, config.vocab_size), **layout}
    sections = [
        local_parallel({"local_parallel": {**given, "link": {"transfer": transfer}}})
        for transfer in (0.0, 1.0)
    ]
    plans = [RunPlan(section, num_segments, count) for section in sections]
    parts = choose_parts(config, sections[0], num_segments, count, seq_len)
    unit = unit_flops(config, sections[0].head, num_segments, seq_len)
    mean_forward = unit.block / 3 * (parts[-1] - 2) / num_segments  # of a stage
    forward, input_grad, weight_grad, head = segment_times(unit, parts)
    times = {
        link: _run_time(plan, Costs(forward, input_grad, weight_grad, head, link * mean_forward))
        for link, plan in enumerate(plans)
    }
    return times, auxiliary_shares(config, sections[0], plans[0].schedule_at(0), parts, seq_len)


def _run_time(plan: RunPlan, costs: Costs) -> float:
    """Time of a run, phase by phase."""
    stretches = _stretches(plan.section)
    ends = [start for start, _ in stretches[1:]] + [_STEPS]
    time = 0.0
    for (start, period), end in zip(stretches, ends, strict=True):
        schedules = [plan.schedule_at(start + i) for i in range(period)]
        time += (end - start) * simulate(schedules, costs).steady_period
    return time


def _stretches(section: LocalParallelConfig) -> list[tuple[int, int]]:
    """(first step, steps after which the schedules repeat) of every phase."""
    if section.cycle_steps:
        return [(0, section.cycle_steps)]
    return [(start, scheme.period) for start, scheme in section.schemes()]


def ratios_of(times: Mapping[tuple[int, int], float], steps: float = 1.0) -> dict[str, float]:
    """Time of so many times a run's steps, against that of the balanced 1F1B run."""
    return {f"M={m}, c/F={c}": round(steps * t, 4) for (m, c), t in times.items()}
