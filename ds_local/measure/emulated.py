"""Pipelines whose compute is sleep: real engines, real processes, real messages, on few cores.

Idle time of one rank is not eaten by another one's compute, so four or eight stages show their
bubbles on two cores. A stage sleeps in its forward and, in two autograd nodes, for its input
gradient and for its weight gradient, so that schedules that split the backward pass are treated
fairly. It may hold real layers besides, to be seen by what measures memory.

Each public function runs one system on one rank and returns what that rank saw, see `_run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist

from ds_local.measure import network
from ds_local.measure.live import LiveTensors
from ds_local.measure.sleeping import EVENTS, Head, Stage, Times, loss_fn

LEARNING_RATE = 1e-6


# --- systems --------------------------------------------------------------------------------------


def ds_local(
    times: Times,
    stages: int,
    micro_batches: int,
    steps: int,
    link: network.Shape,
    section: dict[str, Any],
) -> dict[str, Any]:
    """This package with any `local_parallel` section."""
    import ds_local as package
    from ds_local.links.pair import Receiver

    config = _config(micro_batches) | {"local_parallel": section}
    module = package.LocalPipelineModule(
        [Stage(times) for _ in range(stages)],
        stages,
        loss_fn=loss_fn,
        head=lambda segment: Head(times.head),
        config=config,
    )
    engine = package.initialize(model=module, config=config)[0]
    data = _data(times, micro_batches * steps)
    result = _run(lambda: engine.train_batch(data), steps, times, link)
    sizes = [
        end.message_bytes * end.depth for end in engine.connections.own if isinstance(end, Receiver)
    ]
    return result | {"posted_bytes": sum(sizes)}


def deepspeed(
    times: Times, stages: int, micro_batches: int, steps: int, link: network.Shape, dualpipev: bool
) -> dict[str, Any]:
    """DeepSpeed's own PipelineEngine (1F1B) or DualPipeVEngine."""
    import deepspeed as package
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    pieces = 2 if dualpipev else 1
    module_class = DualPipeVModule if dualpipev else PipelineModule
    layers = [Stage(times, pieces) for _ in range(stages * pieces)]
    module = module_class(layers, num_stages=stages, loss_fn=loss_fn, partition_method="uniform")
    engine = package.initialize(model=module, config=_config(micro_batches))[0]
    data = _data(times, micro_batches * steps)
    return _run(lambda: engine.train_batch(data), steps, times, link)


PLACEMENTS: dict[str, Callable[[int, int], list[int]]] = {
    "one": lambda rank, stages: [rank],
    "loop": lambda rank, stages: [rank, rank + stages],
    "v": lambda rank, stages: [rank, 2 * stages - 1 - rank],
}


def torch_pipelining(
    times: Times,
    stages: int,
    micro_batches: int,
    steps: int,
    link: network.Shape,
    schedule: str,
    placement: str,
) -> dict[str, Any]:
    """A schedule of torch.distributed.pipelining."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    held = PLACEMENTS[placement](dist.get_rank(), stages)
    last = len(held) * stages - 1
    modules = [Stage(times, len(held)) for _ in held]
    parts = [
        PipelineStage(module, index, last + 1, torch.device("cpu"))
        for module, index in zip(modules, held, strict=True)
    ]
    runner = get_schedule_class(schedule)(
        parts[0] if placement == "one" else parts, micro_batches, loss_fn=loss_fn, scale_grads=False
    )
    inputs = [torch.ones(micro_batches, times.floats)] if 0 in held else []
    target = torch.zeros(micro_batches, 1) if last in held else None
    optimizer = torch.optim.SGD(
        [p for module in modules for p in module.parameters()], lr=LEARNING_RATE
    )

    def step() -> None:
        optimizer.zero_grad()
        runner.step(
            *inputs, target=target, losses=[] if last in held else None, return_outputs=False
        )
        optimizer.step()

    order = getattr(runner, "pipeline_order", None) or {}
    return _run(step, steps, times, link) | {
        "order": {rank: [str(one or "") for one in actions] for rank, actions in order.items()}
    }


def asynchronous(
    times: Times, stages: int, micro_batches: int, steps: int, link: network.Shape
) -> dict[str, Any]:
    """1F1B that never flushes (PipeDream's order, Narayanan et al. 2019), over this package's
    links.

    Weights change under the micro-batches that are under way, every `micro_batches` backward passes
    and without stashing (as in PipeMare and PACI): gradients are stale and computed with newer
    weights than their forwards.
    """
    from ds_local.links.buffers import Tag
    from ds_local.links.groups import Groups
    from ds_local.links.transport import make_end

    rank, total, groups = dist.get_rank(), micro_batches * steps, Groups()

    def end(kind: str, source: int, target: int) -> Any:
        name = f"{kind} link {source} -> {target}"
        ranks, host = [list(range(stages))], torch.device("cpu")
        return make_end(name, rank, source, target, ranks, 4, 300.0, host, groups)

    up = [end("activation", s, s + 1) for s in range(stages - 1)]
    down = [end("gradient", s + 1, s) for s in range(stages - 1)]
    module, live = Stage(times), {}
    done = iter(range(total))

    def forward(n: int) -> None:
        tag = Tag(*divmod(n, micro_batches))
        x = (
            up[rank - 1].receive(tag)[1]["x"].requires_grad_()
            if rank
            else torch.ones(1, times.floats)
        )
        live[n] = x, module(x)
        if rank + 1 < stages:
            up[rank].send(tag, {"x": live[n][1]})

    def backward() -> None:
        n = next(done)
        tag = Tag(*divmod(n, micro_batches))
        x, y = live.pop(n)
        if rank + 1 < stages:
            y.backward(down[rank].receive(tag)[1]["g"])
        else:
            loss_fn(y, y).backward()
        if rank:
            down[rank - 1].send(tag, {"g": x.grad})

    ahead = iter(range(total))

    def step() -> None:
        for _ in range(micro_batches):
            while len(live) < stages - rank and (n := next(ahead, None)) is not None:
                forward(n)
            backward()
        for parameter in module.parameters():
            parameter.data.sub_(parameter.grad, alpha=LEARNING_RATE)  # type: ignore[arg-type]
            parameter.grad = None

    result = _run(step, steps, times, link)
    for one in (*up, *down):
        if hasattr(one, "flush"):
            one.flush()
    return result


def _config(micro_batches: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    }


def _data(times: Times, number: int) -> Any:
    return iter([(torch.ones(1, times.floats), torch.zeros(1))] * number)


# --- measuring ------------------------------------------------------------------------------------


def _run(step: Callable[[], Any], steps: int, times: Times, link: network.Shape) -> dict[str, Any]:
    """Take `steps` steps.

    Returns:
        ends: time of each step's end; events: this rank's sleeps; and if the stages hold layers
            live_bytes: the most that
        autograd kept alive at once, unit_bytes: what one micro-batch of a whole stage keeps,
        rss_bytes: by how much the process grew at its highest.
    """
    network.shape_this_rank(link)
    EVENTS.clear()
    ends = []
    if not times.layers:
        for _ in range(steps):
            step()
            ends.append(time.time())
        dist.barrier()  # who is done first must not leave while others still expect it
        return {"ends": ends, "events": list(EVENTS)}
    unit = LiveTensors()
    stage = Stage(times)
    with unit:
        kept = stage(torch.ones(1, times.floats, requires_grad=True))
    del kept, stage
    with LiveTensors(watch_process=True) as live:
        for _ in range(steps):
            step()
            ends.append(time.time())
    dist.barrier()
    return {
        "ends": ends,
        "events": list(EVENTS),
        "live_bytes": live.peak,
        "unit_bytes": unit.peak,
        "rss_bytes": live.process_growth,
    }


def period(results: list[dict[str, Any]], warm: int) -> float:
    """Seconds a step takes once the run has settled: from a warm step to the last one, on the rank
    that is last."""
    return max((r["ends"][-1] - r["ends"][warm - 1]) / (len(r["ends"]) - warm) for r in results)
