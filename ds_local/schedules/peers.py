"""The schedules that other pipelines run, as `Schedule` objects, so that the simulator compares
like with like.

gpipe          all forwards, then all backwards (Huang et al. 2019)
1f1b           the row `backprop`: what DeepSpeed and Megatron run by default
interleaved    1F1B over several segments per stage, dealt round-robin (Narayanan et al. 2021)
zero_bubble    backward split in two, the weight gradients fill the gaps: ZB-H1 (Qi et al. 2024,
               arXiv 2401.10241)
zero_bubble_2  the same with twice the memory: ZB-H2

Pure Python. The engine runs none of these objects; of the schedules, 1F1B and zero bubble are its
own `backprop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ds_local.errors import ScheduleError
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes
from ds_local.schedules.schedule import BACKWARD, FORWARD, Action, Schedule


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    rows = (make_routes("backprop", num_stages),) * num_micro_batches
    stages = tuple(
        tuple(
            Action(kind, stage, m) for kind in (FORWARD, BACKWARD) for m in range(num_micro_batches)
        )
        for stage in range(num_stages)
    )
    return Schedule("gpipe", stages, tuple(range(num_stages)), rows)


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    return _backprop("1f1b", num_stages, num_micro_batches, split_backward=0)


def _backprop(name: str, num_stages: int, num_micro_batches: int, split_backward: int) -> Schedule:
    mix = [(make_routes("backprop", num_stages), num_micro_batches)]
    return replace(make_schedule(mix, num_stages, split_backward=split_backward), name=name)


def interleaved(num_stages: int, num_micro_batches: int, per_stage: int = 2) -> Schedule:
    """Megatron's order: groups of `num_stages` micro-batches go through one segment of every stage,
    then the next.

    Raises:
        ScheduleError: when the micro-batches do not fill whole groups.
    """
    if num_micro_batches % num_stages:
        raise ScheduleError(
            f"interleaved 1F1B needs micro-batches in multiples of the {num_stages} stages, got "
            f"{num_micro_batches}"
        )
    num_segments = num_stages * per_stage
    total = num_micro_batches * per_stage

    def nth(kind: str, stage: int, n: int) -> Action:
        group, within = divmod(n, num_segments)
        row, column = divmod(within, num_stages)
        if kind == BACKWARD:
            row = per_stage - 1 - row
        return Action(kind, row * num_stages + stage, group * num_stages + column)

    stages = []
    for stage in range(num_stages):
        warm_up = min(total, 2 * (num_stages - 1 - stage) + (per_stage - 1) * num_stages)
        actions = [nth(FORWARD, stage, n) for n in range(warm_up)]
        for n in range(total - warm_up):
            actions += [nth(FORWARD, stage, warm_up + n), nth(BACKWARD, stage, n)]
        actions += [nth(BACKWARD, stage, n) for n in range(total - warm_up, total)]
        stages.append(tuple(actions))
    rows = (make_routes("backprop", num_segments),) * num_micro_batches
    return Schedule(
        f"interleaved({per_stage})",
        tuple(stages),
        tuple(s % num_stages for s in range(num_segments)),
        rows,
    )


def zero_bubble(num_stages: int, num_micro_batches: int, memory: int = 1) -> Schedule:
    """Weight gradients wait where 1F1B would idle.

    Args:
        memory: live micro-batches in units of 1F1B's first stage: 1 for ZB-H1, 2 for ZB-H2.
    """
    return _backprop(f"zero_bubble(h{memory})", num_stages, num_micro_batches, memory)


PEERS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
    "zero_bubble_2": partial(zero_bubble, memory=2),
}
TITLES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "interleaved 1F1B",
    "zero_bubble": "ZB-H1",
    "zero_bubble_2": "ZB-H2",
}  # of pictures
