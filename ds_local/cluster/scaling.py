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
ALONE = "data parallel"  # the scheme of one stage


class Cell(NamedTuple):
    """A scheme on a number of stages and replicas."""

    scheme: str
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
    schemes: Sequence[str],
    growing: bool,
) -> list[Cell]:
    """Every scheme on every number of stages and replicas, up to `MOST_DEVICES`.

    Args:
        cluster: what its nodes and links are like; it has as many nodes as are needed.
        sequences: of a step, or of each replica's part of it.
        schemes: by name, `ALONE` for one stage among them.
        growing: the step grows with the replicas; else it is the same on any number of devices.
    """
    cells = []
    for scheme in schemes:
        for stages in (n for n in STAGES if (n == 1) == (scheme == ALONE) and n <= model.depth):
            for replicas in (n for n in REPLICAS if n * stages <= MOST_DEVICES):
                asked = sequences * (replicas if growing else 1)
                cells.append(_cell(model, cluster, asked, heads, scheme, stages, replicas))
    return cells


def _cell(
    model: Model,
    cluster: Cluster,
    sequences: int,
    heads: Sequence[str],
    scheme: str,
    stages: int,
    replicas: int,
) -> Cell:
    sized = _of_size(cluster, stages * replicas)
    if sized is None:
        return Cell(scheme, stages, replicas, None, "no whole nodes")
    pricing = Pricing(model, sized, sequences)
    found = [
        pricing.price(one) for one in layouts(model, sized, sequences, heads, [scheme], stages)
    ]
    if not found:
        return Cell(scheme, stages, replicas, None, "no such layout")
    fitting = [price for price in found if price.memory <= sized.memory_gib * GIB]
    if not fitting:
        return Cell(scheme, stages, replicas, None, "too large")
    fitting.sort(key=lambda price: price.cost)
    # of each micro-batch and placement the heads with the lowest bound
    apart = {(p.candidate.micro_batch, p.candidate.placement): p for p in reversed(fitting)}
    first = sorted(apart.values(), key=lambda price: price.cost)
    return Cell(scheme, stages, replicas, best_of(pricing, first, keep=1)[0], "")


def _of_size(cluster: Cluster, devices: int) -> Cluster | None:
    """The same nodes, as many as hold so many devices."""
    each = min(cluster.devices_per_node, devices)
    if devices % each:
        return None
    return replace(cluster, nodes=devices // each, devices_per_node=each)


def tables(cells: Iterable[Cell]) -> str:
    """A grid for each scheme: stages downward, replicas across; that of one stage stands on top."""
    by_scheme: dict[str, list[Cell]] = {}
    for cell in cells:
        by_scheme.setdefault(cell.scheme, []).append(cell)
    alone = by_scheme.pop(ALONE, [])
    lines = []
    for scheme, held in (by_scheme or {ALONE: []}).items():
        lines += [
            f"{scheme}: tokens per second of a device",
            _line("stages", [*map(str, REPLICAS)]),
        ]
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
            points = best.setdefault(cell.scheme, {})
            speed = cell.price.device_tokens_per_second
            points[cell.devices] = max(speed, points.get(cell.devices, 0.0))
    numbers = sorted({devices for points in best.values() for devices in points})
    curves = [
        Curve(
            scheme,
            color_of(place, len(best)),
            [(numbers.index(devices), speed) for devices, speed in sorted(points.items())],
            dots=True,
        )
        for place, (scheme, points) in enumerate(best.items())
    ]
    return chart(
        "Scaling: the best number of stages for each number of devices",
        curves,
        "devices",
        "tokens per second of a device",
        y_range=(0.0, None),
        x_ticks=[(place, f"{devices:,}") for place, devices in enumerate(numbers)],
    )
