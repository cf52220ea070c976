"""What the simulator makes of stages that were measured on one device, for several such devices."""

from __future__ import annotations

from typing import Any

from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, simulate

Row = dict[str, Any]

LINKS = {
    "NVLink 450 GB/s": 3.6e12,
    "100 Gb/s": 1e11,
    "10 Gb/s": 1e10,
    "1 Gb/s": 1e9,
}  # bits per second
# name -> mode, split_backward; "backprop" is 1F1B, with a split ZB-H1 or ZB-H2
PREDICTED = {
    "local": ("local", 0),
    "chunked 2": ("chunked", 0),
    "chunked 2, split 2": ("chunked", 2),
    "backprop": ("backprop", 0),
    "backprop, split 1": ("backprop", 1),
    "backprop, split 2": ("backprop", 2),
}


def predictions(rows: list[Row], tokens: int, micro_batches: int) -> list[Row]:
    """What the simulator makes of measured stages on that many devices.

    All have the cut of `local`. `backprop` is given it without the heads, the readout's loss with
    the last stage's work; chunks pay for the heads of those stages that have a loss. Efficiency is
    the mean stage's useful time over the time of a step, the update left out; tokens a second count
    it.

    Args:
        rows: of the stages of a model.
        tokens: of a micro-batch.
    """
    stages = len(rows)
    times = {
        name: [row[name] for row in rows]
        for name in ("forward", "input_grad", "weight_grad", "head")
    }
    plain = dict(times, head=[0.0] * stages)
    for name in ("forward", "input_grad", "weight_grad"):
        plain[name] = [*times[name][:-1], times[name][-1] + times["head"][-1] / 3]
    useful = sum(sum(plain[name]) for name in ("forward", "input_grad", "weight_grad")) / stages
    update = max(row["optimizer"] for row in rows)
    found = []
    for link, rate in LINKS.items():
        seconds = rows[0]["activation_bytes"] * 8 / rate
        for schedule, (mode, split) in PREDICTED.items():
            heads = mode != "backprop"
            costs = Costs(**(times if heads else plain), link=seconds)  # type: ignore[arg-type]
            mix = [(make_routes(mode, stages), micro_batches)]
            order = make_schedule(mix, stages, split_backward=split)
            period = simulate(order, costs).steady_period
            kept = ("model", "stages", "compiled")
            found.append(
                {
                    "what": "prediction",
                    "system": "simulator",
                    "schedule": schedule,
                    **{key: rows[0][key] for key in kept},
                    "micro_batches": micro_batches,
                    "link": {"name": link, "bits_per_second": rate},
                    "efficiency": micro_batches * useful / period,
                    "step_seconds": period + update,
                    "tokens_per_second": tokens * micro_batches / (period + update),
                    "peak_live_micro_batches": list(order.peak_live),
                }
            )
    return found
