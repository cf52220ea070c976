"""What a scheme of the planner asks of its stages, read from its schedule."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ds_local.cluster.candidates import PLANNED
from ds_local.config.catalog import section_of
from ds_local.config.files import local_parallel
from ds_local.config.strict import SECTION
from ds_local.schedules.run_ahead import copies_of
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Schedule
from ds_local.schedules.simulator import StepTimer


def section_for(scheme: str, micro_batches: int) -> dict[str, Any]:
    """The "local_parallel" section of one of `PLANNED`."""
    return section_of(PLANNED[scheme], micro_batches)


@lru_cache(maxsize=4096)
def schedule_for(scheme: str, stages: int, micro_batches: int) -> Schedule:
    return RunPlan.of(
        local_parallel({SECTION: section_for(scheme, micro_batches)}), stages, micro_batches
    ).schedule_at(0)


@lru_cache(maxsize=4096)
def timer_for(scheme: str, stages: int, micro_batches: int) -> StepTimer:
    return StepTimer(schedule_for(scheme, stages, micro_batches))


class Sample(NamedTuple):
    """What a scheme asks of its stages."""

    rows: tuple[Any, ...]
    losses: list[float]  # of each stage, the share of micro-batches that compute its loss
    peak_live: tuple[int, ...]
    peak_deferred: tuple[int, ...]
    copies: list[int]  # of each stage, the most earlier weights that it keeps
    flushes: bool  # no forward of a step begins before the update of the one before
    sends_gradients: bool


@lru_cache(maxsize=4096)
def sample_of(scheme: str, stages: int, micro_batches: int) -> Sample:
    """From a schedule of at most so many micro-batches."""
    schedule = schedule_for(scheme, stages, min(micro_batches, 4 * stages))
    predicts = PLANNED[scheme].get(
        "predict_weights", False
    )  # from the weights before the last update
    rows = schedule.rows
    losses = [
        sum(stage in routes.weights for routes in rows) / len(rows) for stage in range(stages)
    ]
    return Sample(
        rows,
        losses,
        schedule.peak_live,
        schedule.peak_deferred,
        [kept + (predicts and kept > 0) for kept in copies_of(schedule)],
        not schedule.leads,
        schedule.message_counts()["gradients"] > 0,
    )


def delay_of(scheme: str, stages: int, micro_batches: int) -> float:
    """How much older its oldest gradients are than the weights they change, in steps."""
    leads = schedule_for(scheme, stages, min(micro_batches, 4 * stages)).leads
    return max(leads, default=0) / micro_batches


@lru_cache(maxsize=4096)
def streams_leaving_a_node(
    stages: int, replicas: int, placement: str, devices_per_node: int
) -> tuple[int, int]:
    """Of the fullest node: (activations to a next stage elsewhere, rings of replicas that go on
    elsewhere).

    Rank = stage x replicas + replica where stages lie across nodes, replica x stages + stage within
    a node.
    """
    across = placement == "across_nodes"
    ranks = np.arange(stages * replicas)
    stage, replica = (
        (ranks // replicas, ranks % replicas) if across else (ranks % stages, ranks // stages)
    )

    def node(of_stage: Any, of_replica: Any) -> Any:
        rank = of_stage * replicas + of_replica if across else of_replica * stages + of_stage
        return rank // devices_per_node

    here = ranks // devices_per_node
    edges = here[(stage + 1 < stages) & (node(np.minimum(stage + 1, stages - 1), replica) != here)]
    rings = here[(replicas > 1) & (node(stage, (replica + 1) % replicas) != here)]
    return int(np.bincount(edges, minlength=1).max()), int(np.bincount(rings, minlength=1).max())
