"""What each segment's work costs in floating-point operations, and where to cut a model so that the
busiest is light.

Counts are of matrix products, per token, in training: a forward costs f, its two gradients f each;
what is read-only has no weight gradient. Measured times from a profile can stand in for the counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ds_local.config.schema import LocalParallelConfig
from ds_local.config.sections import HeadConfig
from ds_local.errors import ConfigError
from ds_local.model import anatomy, families
from ds_local.model.cut import balance
from ds_local.model.routers import routers_of
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import BACKWARD, FORWARD, INPUT_GRADIENT, Schedule


class UnitCosts(NamedTuple):
    """Training cost of one block, of the model's readout and of a segment's auxiliary head, per
    token, in one unit."""

    block: float
    readout: float
    heads: list[float]  # of segments 0 to K - 2, whether or not the routes give them a loss


def unit_flops(config: Any, head: HeadConfig, num_segments: int, seq_len: int) -> UnitCosts:
    """From the shapes of the model."""
    block, readout = forward_flops(config, seq_len)
    heads = [_head_flops(config, head, segment, block) for segment in range(num_segments - 1)]
    return UnitCosts(3 * block, 3 * readout, heads)


def forward_flops(config: Any, seq_len: int) -> tuple[float, float]:
    """(one block, the mean of all; readout): floating-point operations of a forward pass per token,
    matrix products only. Of experts those that a token goes to."""
    blocks: Any = anatomy.skeleton(config).get_submodule(anatomy.family_of(config).blocks)
    routers = routers_of(config)
    share = 1.0 if routers is None else routers.top_k / routers.num_experts
    sizes = {2: 1.0, 3: share}
    weights = sum(p.numel() * sizes.get(p.dim(), 0.0) for p in blocks.parameters()) / len(blocks)
    attention = 4 * seq_len * config.hidden_size  # scores and their product with the values
    return 2.0 * weights + attention, 2.0 * config.vocab_size * config.hidden_size


def _head_flops(config: Any, head: HeadConfig, segment: int, block: float) -> float:
    private = (
        head.blocks_of(segment, families.num_blocks(config))
        * block
        * (2 if head.blocks_from == "next_tracked" else 3)
    )
    width, classes = config.hidden_size, head.classes_in_training(config.vocab_size)
    readout = 2.0 * (head.rank * (width + classes) if head.rank else width * classes)
    read = readout * (2 if head.readout == "shared" else 3)
    square = 3 * 2.0 * width**2  # of a matrix that learns
    sampled = head.token_fraction * (read + square * head.adapter)
    return private + sampled + square * bool(head.companion)


def unit_times(profile: str | Path) -> UnitCosts:
    """From a run's profile.json (times of one micro-batch); heads take nothing where the run had
    none, see `with_heads`.

    Raises:
        ConfigError: when the file holds something else.
    """
    try:
        facts = json.loads(Path(profile).read_text())
        costs, parts = facts["costs"], facts["layout"]["segment_parts"]
        sizes = _blocks_of(parts)
        whole = [
            sum(costs[part][s] for part in ("forward", "input_grad", "weight_grad"))
            for s in range(len(sizes))
        ]
        measured = [seconds for seconds in costs["head"][:-1] if seconds]
        heads = [seconds or (mean(measured) if measured else 0.0) for seconds in costs["head"][:-1]]
        return UnitCosts(sum(whole) / sum(sizes), costs["head"][-1], heads)
    except (OSError, KeyError, TypeError, IndexError, ZeroDivisionError, ValueError) as error:
        raise ConfigError(
            f"local_parallel.partition names {profile}, which is no profile written by "
            f"scripts/train.py --profile: {error}"
        ) from error


def with_heads(
    unit: UnitCosts, config: Any, head: HeadConfig, num_segments: int, seq_len: int
) -> UnitCosts:
    """Measured times; where no head was measured, heads take as many blocks as by their
    floating-point operations."""
    if any(unit.heads):
        return unit
    flops = unit_flops(config, head, num_segments, seq_len)
    return unit._replace(heads=[unit.block * (one / flops.block) for one in flops.heads])


def choose_parts(
    config: Any,
    section: LocalParallelConfig,
    num_segments: int,
    num_micro_batches: int,
    seq_len: int,
) -> list[int]:
    """Layer boundaries of the segments: at least one block each, the embedding with the first, the
    readout with the last.

    Balanced for the first phase of the run.

    Raises:
        ConfigError: when the profile does not fit.
    """
    depth = families.num_blocks(config)
    if section.partition == "uniform":
        costs, extras = [1.0] * depth, [0.0] * num_segments
    else:
        known = section.partition == "cost"
        unit = (
            unit_flops(config, section.head, num_segments, seq_len)
            if known
            else unit_times(section.partition)
        )
        if len(unit.heads) != num_segments - 1:
            raise ConfigError(
                f"the profile {section.partition} is of {len(unit.heads) + 1} segments, this run "
                f"has {num_segments}; "
                'profile a run with as many, or use partition "cost"'
            )
        unit = with_heads(unit, config, section.head, num_segments, seq_len)
        costs = [unit.block] * (depth - 1) + [unit.block + unit.readout]
        extras = [
            c * s
            for c, s in zip(
                [*unit.heads, 0.0],
                _loss_shares(section, num_segments, num_micro_batches),
                strict=True,
            )
        ]
    cuts = balance(costs, extras)
    return [0, *(cut + 1 for cut in cuts[1:-1]), depth + 2]


def _loss_shares(
    section: LocalParallelConfig, num_segments: int, num_micro_batches: int
) -> list[float]:
    """For each segment the share of the micro-batches in the first step that compute its loss."""
    rows = RunPlan.of(
        section, num_segments // section.segments_per_stage, num_micro_batches
    ).rows_at(0)
    return [
        sum(count for routes, count in rows if s in routes.weights) / num_micro_batches
        for s in range(num_segments)
    ]


def segment_times(unit: UnitCosts, parts: Sequence[int]) -> tuple[list[float], ...]:
    """(forward, input gradient, weight gradient, head) of each segment, the first three alike: for
    `simulator.Costs`."""
    third = [unit.block / 3 * blocks for blocks in _blocks_of(parts)]
    return third, third, third, [*unit.heads, unit.readout]


def _blocks_of(parts: Sequence[int]) -> list[int]:
    """Blocks in each segment: its layers without the embedding and the readout."""
    sizes = [b - a for a, b in pairwise(parts)]
    sizes[0] -= 1
    sizes[-1] -= 1
    return sizes


def auxiliary_shares(
    config: Any,
    section: LocalParallelConfig,
    schedule: Schedule,
    parts: Sequence[int],
    seq_len: int,
) -> list[float]:
    """For each stage the share of a step's floating-point operations that backpropagation would not
    compute."""
    unit = unit_flops(config, section.head, len(parts) - 1, seq_len)
    return [
        cost["auxiliary"] / (cost["useful"] + cost["auxiliary"])
        for cost in stage_flops(schedule, unit, parts)
    ]


def stage_flops(
    schedule: Schedule, unit: UnitCosts, parts: Sequence[int]
) -> list[dict[str, float]]:
    """For each stage the cost of a step per token of a micro-batch: "useful" is what
    backpropagation would compute too, "auxiliary" are heads and gradients that are only handed
    through."""
    last = len(schedule.stage_of) - 1
    sizes = _blocks_of(parts)
    costs = [{"useful": 0.0, "auxiliary": 0.0} for _ in schedule.stages]
    for stage, actions in enumerate(schedule.stages):
        for action in actions:
            third = unit.block * sizes[action.segment] / 3
            handed_through = action.kind == INPUT_GRADIENT and not schedule.route(action).weights
            kind = "auxiliary" if handed_through else "useful"
            costs[stage][kind] += third * {FORWARD: 1, BACKWARD: 2}.get(action.kind, 1)
        for segment in (s for s, p in enumerate(schedule.stage_of) if p == stage):
            losses = sum(segment in routes.weights for routes in schedule.rows)
            if segment == last:
                costs[stage]["useful"] += losses * unit.readout
            else:
                costs[stage]["auxiliary"] += losses * unit.heads[segment]
    return costs
