"""The degrees of parallelism: how many pipeline stages, how many replicas."""

from __future__ import annotations

from ds_local.config.deepspeed import check_number
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError


def num_stages_and_replicas(
    section: LocalParallelConfig, world_size: int, num_stages: int | None = None
) -> tuple[int, int]:
    """How the processes divide into pipeline stages and data-parallel replicas.

    Args:
        num_stages: what the caller asks for; default the section's `num_stages`, or one stage per
            process.

    Raises:
        ConfigError: when the stages do not divide the processes.
    """
    if num_stages is not None:
        check_number("num_stages", num_stages)
    stages = num_stages or section.num_stages or world_size
    if num_stages and section.num_stages and num_stages != section.num_stages:
        raise ConfigError(
            f"num_stages is {num_stages} but {SECTION}.num_stages is {section.num_stages}; make "
            "them agree"
        )
    if world_size % stages:
        raise ConfigError(
            f"{world_size} processes cannot be divided into {stages} stages; start a multiple of "
            f"{stages} processes"
        )
    return stages, world_size // stages
