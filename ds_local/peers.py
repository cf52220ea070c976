"""The schedules that other pipelines run, as `Schedule` objects, so that the simulator compares like with like.

gpipe          all forwards, then all backwards (Huang et al. 2019)
1f1b           the row `backprop`: what DeepSpeed and Megatron run by default
interleaved    1F1B over several segments per stage, dealt round-robin (Narayanan et al. 2021)
zero_bubble    backward split in two, the weight gradients fill the gaps: ZB-H1 (Qi et al. 2024, arXiv 2401.10241)
zero_bubble_2  the same with twice the memory: ZB-H2

Pure Python. Nothing here is executed by the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ds_local.order import make_schedule
from ds_local.routes import make_routes
from ds_local.schedule import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Schedule


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    rows = (make_routes("backprop", num_stages),) * num_micro_batches
    stages = tuple(
        tuple(Action(kind, stage, m) for kind in (FORWARD, BACKWARD) for m in range(num_micro_batches))
        for stage in range(num_stages)
    )
    return Schedule("gpipe", stages, tuple(range(num_stages)), rows)


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    plain = make_schedule([(make_routes("backprop", num_stages), num_micro_batches)], num_stages)
    return Schedule("1f1b", plain.stages, plain.stage_of, plain.rows)


def interleaved(num_stages: int, num_micro_batches: int, per_stage: int = 2) -> Schedule:
    """Megatron's order: groups of `num_stages` micro-batches go through one segment of every stage, then the next.

    Raises:
        ValueError: when the micro-batches do not fill whole groups.
    """
    if num_micro_batches % num_stages:
        raise ValueError(f"interleaved 1F1B needs micro-batches in multiples of the {num_stages} stages, got {num_micro_batches}")
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
    return Schedule(f"interleaved({per_stage})", tuple(stages), tuple(s % num_stages for s in range(num_segments)), rows)


def zero_bubble(num_stages: int, num_micro_batches: int, memory: int = 1) -> Schedule:
    """Weight gradients wait: stage s computes that of a micro-batch `memory` x s input gradients later, where 1F1B would idle.

    Args:
        memory: live micro-batches in units of 1F1B's first stage: 1 for ZB-H1, 2 for ZB-H2.

    Raises:
        ValueError: when there are too few micro-batches to fill the gaps with.
    """
    if num_micro_batches < memory * num_stages - (memory - 1):
        raise ValueError(
            f"ZB-H{memory} on {num_stages} stages needs {memory * num_stages - memory + 1} micro-batches, got {num_micro_batches}"
        )
    stages = []
    for stage in range(num_stages):
        ahead = min(num_micro_batches, memory * (num_stages - stage) - (memory - 1))
        delay = memory * stage
        actions = [Action(FORWARD, stage, m) for m in range(ahead)]
        for m in range(num_micro_batches):
            actions.append(Action(INPUT_GRADIENT, stage, m))
            if m >= delay:
                actions.append(Action(WEIGHT_GRADIENT, stage, m - delay))
            if m + ahead < num_micro_batches:
                actions.append(Action(FORWARD, stage, m + ahead))
        actions += [Action(WEIGHT_GRADIENT, stage, m) for m in range(max(0, num_micro_batches - delay), num_micro_batches)]
        stages.append(tuple(actions))
    rows = (make_routes("backprop", num_stages),) * num_micro_batches
    return Schedule(f"zero_bubble(h{memory})", tuple(stages), tuple(range(num_stages)), rows)


PEERS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
    "zero_bubble_2": partial(zero_bubble, memory=2),
}
