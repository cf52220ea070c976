"""How fast steps are: tokens a second, of all devices and of one, and how much of a device's peak
that uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ds_local.engine.engine import LocalPipelineEngine
from ds_local.model.flops import stage_flops, unit_flops

# dense bf16 operations a second, by what a device's name contains, from the makers' data sheets;
# longer names first where one contains another
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_of(name: str) -> float | None:
    """Operations a second of a device, None where they are not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Pace:
    """Figures of a step's speed, from its reports.

    Args:
        tokens: of a step, all replicas together.
        devices: that work on it, one a rank.
        operations: step -> floating-point operations that backpropagation needs for it; heads do
            not count.
        peak: operations a second of one device; None: not known, or a CPU.
    """

    def __init__(
        self, tokens: int, devices: int, operations: Callable[[int], float], peak: float | None
    ) -> None:
        self.tokens, self.devices = tokens, devices
        self._operations, self._peak = operations, peak

    @classmethod
    def of(cls, engine: LocalPipelineEngine, tokens: int, seq_len: int) -> Pace:
        device = engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(
            tokens,
            engine.module.pipeline_stages * engine.dp_world_size,
            cache(lambda step: useful_operations(engine, step, tokens, seq_len)),
            peak_of(name),
        )

    def figures(self, step: int, seconds: float) -> dict[str, float | None]:
        """As rows of metrics.jsonl have them.

        Args:
            step: from 0.
            seconds: that it took on the slowest stage.
        """
        mfu, seconds = None, max(seconds, 1e-9)
        if self._peak is not None:
            done = self._operations(step)
            mfu = round(done / seconds / self.devices / self._peak, 4)
        return {
            "tokens_per_second": round(self.tokens / seconds, 1),
            "device_tokens_per_second": round(self.tokens / seconds / self.devices, 1),
            "mfu": mfu,
        }


def useful_operations(engine: Any, step: int, tokens: int, seq_len: int) -> float:
    """Floating-point operations of a step that backpropagation would need too."""
    schedule, parts = engine.plan.schedule_at(step), engine.module.segment_parts
    unit = unit_flops(engine.module.hf_config, engine.section.head, len(parts) - 1, seq_len)
    per_token = sum(cost["useful"] for cost in stage_flops(schedule, unit, parts))
    return per_token * tokens / schedule.num_micro_batches
