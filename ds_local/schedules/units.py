"""Units: the stages of a pipeline that live and die together, because gradients cross between them.

Where no gradient crosses a border, the stages below it lose nothing when one above dies, and those
above only wait. So each unit can be a job of its own, started again by itself
(`link.reconnect_seconds`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError, counted
from ds_local.schedules.run_plan import RunPlan, stages_of_segments

KEY = f"{SECTION}.link.reconnect_seconds"
_FOLDER = re.compile(r"unit-(\d+)(?:-replica-(\d+))?")


@dataclass(frozen=True)
class Unit:
    """One of them, of one replica of the pipeline.

    Args:
        number: in depth order, from 0.
        stages: of the whole pipeline.
        num_stages: of the whole pipeline.
        replica, num_replicas: of the whole pipeline.
        meets_in: folder where units leave their addresses; all see it.
        facts: of the run, in a word; all units must have the same.
    """

    number: int
    stages: range
    num_stages: int
    replica: int = 0
    num_replicas: int = 1
    meets_in: str = ""
    facts: str = ""

    def __str__(self) -> str:
        return self.name_of(self.number)

    def name_of(self, number: int) -> str:
        """Of a unit of the same replica, in sentences."""
        beside = f" of replica {self.replica}" if self.num_replicas > 1 else ""
        return f"unit {number}{beside}"


def folder_of(number: int, replica: int, num_replicas: int) -> str:
    """The name of a unit's run folder, in that of the whole run."""
    return f"unit-{number}" + (f"-replica-{replica}" if num_replicas > 1 else "")


def unit_folders(run: str | Path) -> dict[int, list[Path]]:
    """Number of a unit -> its run folders, one of each replica, in the folder of a whole run."""
    found: dict[int, dict[int, Path]] = {}
    for path in Path(run).glob("unit-*"):
        name = _FOLDER.fullmatch(path.name)
        if name and path.is_dir():
            found.setdefault(int(name[1]), {})[int(name[2] or 0)] = path
    return {
        number: [found[number][one] for one in sorted(found[number])] for number in sorted(found)
    }


def units_of(plan: RunPlan) -> list[range]:
    """The stages of each unit, in depth order: two stages are of the same one where a gradient
    crosses between them in any step of the run.

    Raises:
        ConfigError: when they are all one, so that none could go on alone.
    """
    stages, crossed = stages_of_segments(plan.section, plan.num_stages), set()
    for link in plan.gradient_links:
        if stages[link.lower] != stages[link.lower + 1]:
            crossed.add(stages[link.lower])
    starts = [stage for stage in range(plan.num_stages) if stage == 0 or stage - 1 not in crossed]
    units = [
        range(start, end) for start, end in zip(starts, [*starts[1:], plan.num_stages], strict=True)
    ]
    if len(units) < 2:
        raise ConfigError(
            f"{KEY} is for stages that can go on while another is away, but here gradients cross "
            f"between all {plan.num_stages} stages in some step; use a scheme of local losses or "
            "chunks in every phase, or leave it 0"
        )
    return units


def check_units(section: LocalParallelConfig, plan: RunPlan) -> None:
    """Refuse what needs all stages in one job.

    Raises:
        ConfigError: naming the key.
    """
    copies = section.head.readout == "shared" or section.head.blocks_from == "next_tracked"
    refused = {
        "head.readout or head.blocks_from": copies and "heads take copies from other stages",
        "run_ahead": plan.steps_ahead and "steps overlap across stages",
        "diagnostics": section.diagnostics and "probes go through the whole model",
        "link.past_host": section.link.past_host and "NCCL groups cannot be made again",
        "schedule": section.schedule and "a given schedule may deal segments to stages in any way",
        "replicas.sync": section.replicas.sync != "gradients" and "replicas meet in groups",
    }
    for name, why in refused.items():
        if why:
            raise ConfigError(
                f"{KEY} makes every unit of stages a job of its own, but with {SECTION}.{name} as "
                f"it is {why}; change that, or leave reconnect_seconds 0"
            )


def unit_of(
    section: LocalParallelConfig,
    plan: RunPlan,
    number: int,
    processes: int,
    replica: int = 0,
    num_replicas: int = 1,
) -> Unit:
    """The unit that this job is.

    Args:
        processes: of this job.

    Raises:
        ConfigError: when there is no such unit, or it has another number of stages.
    """
    check_units(section, plan)
    units = units_of(plan)
    if number >= len(units):
        raise ConfigError(
            f"--unit {number} does not exist: this scheme on {plan.num_stages} stages has "
            f"{len(units)} units, from 0 to {len(units) - 1}"
        )
    if num_replicas > 1 and any(len(stages) > 1 for stages in units):
        raise ConfigError(
            f"with {num_replicas} replicas every unit must be one stage, but here gradients cross "
            "between some; use local losses, or one replica"
        )
    if not replica < num_replicas:
        raise ConfigError(f"--replica {replica} of {num_replicas} does not exist; count from 0")
    stages = units[number]
    if processes != len(stages):
        raise ConfigError(
            f"unit {number} has {counted(len(stages), 'stage')} "
            f"({', '.join(map(str, stages))}) but this job has {processes} processes; start one "
            "process for each stage"
        )
    return Unit(number, stages, plan.num_stages, replica, num_replicas)
