"""How schemes scale: tokens per second of a device, over stages and replicas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ds_local.charts.plots import Curve, chart
from ds_local.charts.style import color_of
from ds_local.charts.svg import Svg
from ds_local.cluster.candidates import GIB, Cluster, Model
from ds_local.cluster.planner import best_of, layouts
from ds_local.cluster.prices import Price
from ds_local.cluster.pricing import Pricing

MOST_DEVICES = 4096
STAGES = (1, 2, 4, 8, 16, 32, 64)
REPLICAS = (1, 4, 16, 64, 256, 1024)
ALONE = "data parallel"  # the row of one stage


class Cell(NamedTuple):
    """A scheme on a number of stages and replicas."""

    row: str
    stages: int
    replicas: int
    price: Price | None  # of the best layout that fits; None: there is none
    why: str  # there is none

    @property
    def devices(self) -> int:
        return self.stages * self.replicas


def scaling(
    model: Model,
    cluster: Cluster,
    sequences: int,
    heads: Sequence[str],
    rows: Sequence[str],
    growing: bool,
    most: int = MOST_DEVICES,
) -> list[Cell]:
    """Every scheme on every number of stages and replicas, up to so many devices.

    Args:
        cluster: what its nodes and links are like; it has as many nodes as are needed.
        sequences: of a step, or of each replica's part of it.
        rows: schemes, `ALONE` for one stage among them.
        growing: the step grows with the replicas; else it is the same on any number of devices.
    """
    cells = []
    for row in rows:
        for stages in (n for n in STAGES if (n == 1) == (row == ALONE) and n <= model.depth):
            for replicas in (n for n in REPLICAS if n * stages <= most):
                asked = sequences * (replicas if growing else 1)
                cells.append(_cell(model, cluster, asked, heads, row, stages, replicas))
    return cells


def _cell(
    model: Model,
    cluster: Cluster,
    sequences: int,
    heads: Sequence[str],
    row: str,
    stages: int,
    replicas: int,
) -> Cell:
    sized = _of_size(cluster, stages * replicas)
    if sized is None:
        return Cell(row, stages, replicas, None, "no whole nodes")
    pricing = Pricing(model, sized, sequences)
    found = [pricing.price(one) for one in layouts(model, sized, sequences, heads, [row], stages)]
    if not found:
        return Cell(row, stages, replicas, None, "no such layout")
    fitting = [price for price in found if price.memory <= sized.memory_gib * GIB]
    if not fitting:
        return Cell(row, stages, replicas, None, "too large")
    fitting.sort(key=lambda price: price.cost)
    # of each micro-batch and placement the heads with the lowest bound
    apart = {(p.candidate.micro_batch, p.candidate.place): p for p in reversed(fitting)}
    first = sorted(apart.values(), key=lambda price: price.cost)
    return Cell(row, stages, replicas, best_of(pricing, first, keep=1)[0], "")


def _of_size(cluster: Cluster, devices: int) -> Cluster | None:
    """The same nodes, as many as hold so many devices."""
    each = min(cluster.devices_per_node, devices)
    if devices % each:
        return None
    return replace(cluster, nodes=devices // each, devices_per_node=each)


def tables(cells: Iterable[Cell]) -> str:
    """A grid for each scheme: stages downward, replicas across; that of one stage stands on top."""
    by_row: dict[str, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    alone = by_row.pop(ALONE, [])
    lines = []
    for row, held in (by_row or {ALONE: []}).items():
        lines += [f"{row}: tokens per second of a device", _line("stages", [*map(str, REPLICAS)])]
        shown = [*alone, *held]
        for stages in sorted({cell.stages for cell in shown}):
            texts = {cell.replicas: _text(cell) for cell in shown if cell.stages == stages}
            lines.append(_line(str(stages), [texts.get(n, "") for n in REPLICAS]))
        lines.append("")
    lines.append(f"columns: replicas; {_NOTES}")
    return "\n".join(lines)


_SIGNS = {"too large": "m", "no such layout": "-", "no whole nodes": "n"}
_NOTES = (
    "m: does not fit into memory, -: too few stages or sequences for the scheme, n: not whole "
    "nodes; one stage is data parallelism"
)


def _text(cell: Cell) -> str:
    return _SIGNS[cell.why] if cell.price is None else f"{cell.price.device_tokens_per_second:,.0f}"


def _line(first: str, others: Sequence[str]) -> str:
    return f"{first:>6}  " + "  ".join(f"{text:>9}" for text in others).rstrip()


def picture(cells: Sequence[Cell]) -> Svg:
    """Each scheme's best tokens per second of a device, by the number of devices."""
    best: dict[str, dict[int, float]] = {}
    for cell in cells:
        if cell.price is not None:
            points = best.setdefault(cell.row, {})
            speed = cell.price.device_tokens_per_second
            points[cell.devices] = max(speed, points.get(cell.devices, 0.0))
    numbers = sorted({devices for points in best.values() for devices in points})
    curves = [
        Curve(
            row,
            color_of(place, len(best)),
            [(numbers.index(devices), speed) for devices, speed in sorted(points.items())],
            dots=True,
        )
        for place, (row, points) in enumerate(best.items())
    ]
    return chart(
        "Scaling: the best number of stages for each number of devices",
        curves,
        "devices",
        "tokens per second of a device",
        y_range=(0.0, None),
        x_ticks=[(place, f"{devices:,}") for place, devices in enumerate(numbers)],
    )
