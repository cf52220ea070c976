"""The pipelines that are compared: how to run each, when it cannot run, and what the simulator says
about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_local.config.catalog import SCHEMES, fewest_micro_batches, section_of
from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError
from ds_local.measure import emulated, sleeping
from ds_local.schedules.cells import read_cell
from ds_local.schedules.peers import gpipe, one_f_one_b
from ds_local.schedules.routes import make_routes
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Action, Schedule
from ds_local.schedules.simulator import Costs, simulate

LINK_DEPTH = 4  # the default of local_parallel.link.depth


@dataclass(frozen=True)
class System:
    """One row of a table."""

    owner: str  # whose pipeline
    schedule: str
    run: Callable[..., dict[str, Any]]  # a function of `emulated`
    # of (stages, micro-batches): what `run` takes besides the common ones
    arguments: Callable[[int, int], tuple[Any, ...]]
    # of (stages, micro-batches, what rank 0 returned)
    theory: Callable[[int, int, Any], Schedule | list[Schedule] | None]
    least: Callable[[int], int] = lambda stages: 1  # of stages: fewest micro-batches
    pieces: int = 1  # of a stage
    head: float = 0.0  # cost of an auxiliary head, as a share of a stage's useful time
    flushes: bool = True

    @property
    def name(self) -> str:
        return f"{self.owner}:{self.schedule}"

    def refuses(self, stages: int, micro_batches: int) -> str | None:
        least = self.least(stages)
        return (
            None
            if micro_batches >= least
            else f"{self.name} needs at least {least} micro-batches at {stages} stages"
        )

    def predicted(
        self, times: sleeping.Times, stages: int, micro_batches: int, link_seconds: float, seen: Any
    ) -> Any:
        """The simulator's `Timeline`, or None where it knows no such schedule."""
        schedule = self.theory(stages, micro_batches, seen)
        if schedule is None:
            return None
        forward, input_grad, weight_grad = (
            t / self.pieces for t in (times.forward, times.input_grad, times.weight_grad)
        )
        depth = LINK_DEPTH if self.owner == "ds_local" else None
        return simulate(
            schedule,
            Costs(forward, input_grad, weight_grad, times.useful * self.head, link_seconds),
            depth,
        )


def _ours(
    scheme: str, head: float = 0.0, transfer: float = 0.0, least: Callable[[int], int] | None = None
) -> System:
    """One of ours.

    Args:
        scheme: name in the table of schemes.
        transfer: `link.transfer` that its order is made for.
        least: fewest micro-batches; default those that the shares of a mix ask for.
    """
    named = SCHEMES[scheme].section

    def section(stages: int, micro_batches: int) -> dict[str, Any]:
        made = section_of(named, micro_batches)
        if "window" in made:
            made["window"] = min(made["window"], stages)
        return made | ({"link": {"transfer": transfer}} if transfer else {})

    def theory(stages: int, micro_batches: int, seen: Any) -> list[Schedule]:
        return RunPlan(
            local_parallel({"local_parallel": section(stages, micro_batches)}),
            stages,
            micro_batches,
        ).schedules

    name = scheme + (f", head {head:.0%}".replace("%", " %") if head else "")
    return System(
        "ds_local",
        name + (f", transfer {transfer:g}" if transfer else ""),
        emulated.ds_local,
        lambda s, m: (section(s, m),),
        theory,
        least or (lambda stages: fewest_micro_batches(named)),
        head=head,
    )


def _torch(schedule: str, placement: str, **settings: Any) -> System:
    def theory(stages: int, micro_batches: int, seen: Any) -> Schedule | None:
        known = {"1F1B": one_f_one_b, "GPipe": gpipe}.get(schedule)
        return known(stages, micro_batches) if known else from_torch(schedule, seen["order"])

    pieces = 1 if placement == "one" else 2
    return System(
        "torch",
        schedule,
        emulated.torch_pipelining,
        lambda s, m: (schedule, placement),
        theory,
        pieces=pieces,
        **settings,
    )


def from_torch(name: str, order: dict[int, Sequence[str]]) -> Schedule:
    """The schedule that torch executes, from its own list of actions for each rank, such as 3F0,
    2I1, 2W1, 0B4."""
    stages: list[tuple[Action, ...]] = []
    stage_of: dict[int, int] = {}
    for rank in sorted(order):
        cells = [cell for text in order[rank] for cell in read_cell(text, rank)]
        stages.append(tuple(Action(cell.kind, cell.segment, cell.micro_batch) for cell in cells))
        stage_of |= {cell.segment: rank for cell in cells}
    micro_batches = 1 + max(action.micro_batch for actions in stages for action in actions)
    rows = (make_routes("backprop", len(stage_of)),) * micro_batches
    return Schedule(name, tuple(stages), tuple(stage_of[s] for s in range(len(stage_of))), rows)


def _flushed(stages: int, micro_batches: int, seen: Any) -> Schedule:
    return one_f_one_b(stages, micro_batches)


def _endless(stages: int, micro_batches: int, seen: Any) -> Schedule | None:
    """Without a flush the period is that of the busiest stage; the simulator flushes, so it cannot
    say."""
    return None


SYSTEMS: tuple[System, ...] = (
    _ours("local"),
    _ours("local", head=0.05),
    _ours("local", head=0.10),
    _ours("local", head=0.30),
    _ours("mixed 1/8"),
    _ours("mixed 1/4"),
    _ours("mixed 1/4", transfer=1.0),
    _ours("mixed auto", least=lambda stages: stages),
    _ours("mixed auto", transfer=1.0, least=lambda stages: 2 * stages),
    _ours("chunked 2"),
    _ours("chunked 2, split 1"),
    _ours("chunked 2, split 2"),
    _ours("chunked 2, run ahead"),
    _ours("chunked 2, run ahead", transfer=1.0),
    _ours("shifted chunks 2"),
    _ours("interlocking 2"),
    _ours("interlocking 3"),
    _ours("overlapping 2"),
    _ours("backprop"),
    _ours("backprop, split 1"),
    _ours("backprop, split 2"),
    _ours("backprop, run ahead"),
    _ours("backprop, run ahead", transfer=1.0),
    System("deepspeed", "1F1B", emulated.deepspeed, lambda s, m: (False,), _flushed),
    System(
        "deepspeed",
        "DualPipeV",
        emulated.deepspeed,
        lambda s, m: (True,),
        lambda s, m, seen: None,
        least=lambda stages: 2 * stages,
        pieces=2,
    ),
    _torch("GPipe", "one"),
    _torch("1F1B", "one", least=lambda stages: stages),
    _torch("Interleaved1F1B", "loop"),
    _torch("InterleavedZeroBubble", "loop"),
    _torch("ZBVZeroBubble", "v"),
    _torch("DualPipeV", "v", least=lambda stages: 2 * stages),
    System(
        "async", "1F1B, no flush", emulated.asynchronous, lambda s, m: (), _endless, flushes=False
    ),
)


def choose(names: Sequence[str] | None) -> list[System]:
    """The systems with these names, or with names that contain them; all without.

    Raises:
        ConfigError: for a name that fits none.
    """
    everything = [system.name for system in SYSTEMS]
    chosen: set[str] = set() if names else set(everything)
    for name in names or ():
        fits = [name] if name in everything else [one for one in everything if name in one]
        if not fits:
            raise ConfigError(f"no system is called {name!r}; there are {', '.join(everything)}")
        chosen.update(fits)
    return [system for system in SYSTEMS if system.name in chosen]


def with_head(times: sleeping.Times, system: System) -> sleeping.Times:
    return replace(times, head=times.useful * system.head)
