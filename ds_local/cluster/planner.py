"""Which layout of a cluster comes to a loss first, before it is bought: every legal layout priced,
the best simulated.

The lower bound on a layout's step is cheap and rules out most of them; those that could still win
go through the simulator, best bound first, until none is left whose bound beats what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_local.cluster.candidates import (
    DEFAULT_SCHEMES,
    GIB,
    PLANNED,
    Candidate,
    Cluster,
    Model,
    has_heads,
    parts_of,
)
from ds_local.cluster.prices import Price
from ds_local.cluster.pricing import Pricing
from ds_local.config.catalog import fewest_micro_batches
from ds_local.errors import ConfigError

# --- legal layouts --------------------------------------------------------------------------------


def layouts(
    model: Model,
    cluster: Cluster,
    sequences: int,
    heads: Sequence[str],
    schemes: Sequence[str],
    num_stages: int | None = None,
) -> Iterator[Candidate]:
    """Every layout that divides `sequences` per step over the whole cluster, of any number of
    stages or of one."""
    asked = [num_stages] if num_stages else range(1, min(model.depth, cluster.devices) + 1)
    for stages in (n for n in asked if cluster.devices % n == 0):
        replicas = cluster.devices // stages
        if sequences % replicas:
            continue
        one_placement = 1 in (stages, replicas, cluster.nodes, cluster.devices_per_node)
        for micro_batch in (2**n for n in range(7)):
            if sequences // replicas % micro_batch:
                break
            micro_batches = sequences // replicas // micro_batch
            for placement in (
                ("across_nodes",) if one_placement else ("across_nodes", "within_node")
            ):
                for scheme in schemes:
                    for head in heads if has_heads(scheme) else ("",):
                        layout = Candidate(
                            stages, replicas, scheme, head, micro_batch, micro_batches, placement
                        )
                        if is_legal(layout):
                            yield layout


def is_legal(layout: Candidate) -> bool:
    if (layout.scheme == "data parallel") != (layout.stages == 1):
        return False
    if layout.scheme == "data parallel":
        return True
    sections = [PLANNED[scheme] for _, scheme in parts_of(layout.scheme)]
    enough = all(layout.micro_batches >= fewest_micro_batches(section) for section in sections)
    return enough and all(section.get("window", 1) < layout.stages for section in sections)


# --- search ---------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The outcome: the best layout of every scheme, the first to come to a loss first, those of
    which nobody knows that last, and what was left out."""

    best: list[Price]
    runners_up: dict[str, list[Price]]  # of each scheme, further layouts, simulated
    too_large: dict[str, Price]  # schemes none of whose layouts fit, with the smallest
    considered: int
    simulated: int


def plan(
    pricing: Pricing,
    heads: Sequence[str],
    schemes: Sequence[str] = tuple(DEFAULT_SCHEMES),
    keep: int = 2,
) -> Plan:
    """Price every legal layout, simulate what could be the best of its scheme.

    Raises:
        ConfigError: when no layout divides the batch.
    """
    candidates: dict[str, list[Price]] = {}
    for layout in layouts(pricing.model, pricing.cluster, pricing.sequences, heads, schemes):
        candidates.setdefault(layout.scheme, []).append(pricing.price(layout))
    if not candidates:
        raise ConfigError(
            f"{pricing.sequences} sequences per step cannot be divided over "
            f"{pricing.cluster.devices} devices; choose --batch-tokens so that it is a multiple of "
            "devices x sequence length, or of fewer replicas with more stages"
        )
    limit = pricing.cluster.memory_gib * GIB
    found: dict[str, list[Price]] = {}
    too_large = {}
    for scheme, prices in candidates.items():
        fitting = sorted((p for p in prices if p.memory <= limit), key=lambda p: p.cost)
        if not fitting:
            too_large[scheme] = min(prices, key=lambda p: p.memory)
            continue
        known = [p for p in fitting if p.learning.tokens is not None]
        found[scheme] = best_of(pricing, known or fitting, keep)
    best = sorted((prices[0] for prices in found.values()), key=lambda p: p.rank)
    return Plan(
        best,
        {scheme: prices[1:] for scheme, prices in found.items()},
        too_large,
        sum(map(len, candidates.values())),
        sum(map(len, found.values())),
    )


def best_of(pricing: Pricing, prices: list[Price], keep: int) -> list[Price]:
    """The simulated ones, best first; `prices` come with their bounds, lowest first."""
    done: list[Price] = []
    for price in prices:
        ranked = sorted(p.cost for p in done)
        if (len(ranked) >= keep and price.cost >= ranked[keep - 1]) or (
            ranked and price.cost >= 1.5 * ranked[0]
        ):
            break
        done.append(pricing.simulate(price))
    return sorted(done, key=lambda p: p.rank)
