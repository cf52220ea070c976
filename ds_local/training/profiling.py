"""What each stage's work really costs, for the simulator; and what really happened, as a trace.

`Recorder` keeps the instructions of the last steps with their times. `measure` times each segment's
forward, head, input gradient and weight gradient by themselves, and a message on each link. `write`
brings the two together and puts them beside the
run: profile.json, which `simulate.py` and `plan.py` read, and trace.json for Chrome or Perfetto
with one lane per stage.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ds_local.charts.traces import lane, span
from ds_local.config import strict_json
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.recorder import Event
from ds_local.links.agreement import gather
from ds_local.links.buffers import Tag
from ds_local.links.device import peak_memory
from ds_local.links.messages import copied_to, parts_of_activation
from ds_local.links.trees import Tree
from ds_local.model.split_linear import no_weight_grads
from ds_local.outputs import write_file
from ds_local.schedules.simulator import Costs, simulate

REPEATS = 10
COMPUTE = (
    "LoadMicroBatch",
    "ForwardPass",
    "GradientPass",
    "WeightGradient",
)  # instructions that never wait for another stage


def measure(engine: LocalPipelineEngine, inputs: Any) -> dict[str, list[float]]:
    """Seconds per segment of every part of its work. A collective call.

    All stages are timed at once, as they run: stages on one machine share its memory and cores.

    Args:
        inputs: a micro-batch for the first segment on the first stage, None elsewhere; shapes as in
            training.

    Returns:
        The costs of all segments on every rank, in the form of `simulator.Costs`.
    """
    own: dict[str, dict[int, float]] = {}
    if inputs is not None:
        parts = engine.module.split_batch(inputs)
        inputs = tuple(copied_to(part, engine.device).value() for part in parts)
    inputs_of = {}
    stage_of = engine.module.stage_of
    for segment, stage in enumerate(stage_of):
        if engine.stage_id == stage:
            inputs_of[segment] = inputs
            with torch.no_grad():
                inputs = engine.module.run_segment(segment, inputs[0]), inputs[1]
        ends = set(stage_of[segment : segment + 2])
        if len(ends) == 2 and engine.stage_id in ends:
            inputs = _measure_link(engine, segment, inputs, own)
    dist.barrier()
    for segment, given in inputs_of.items():
        for name, seconds in _measure_segment(engine, segment, *given).items():
            own.setdefault(name, {})[segment] = seconds
    costs = {
        name: [0.0] * engine.num_segments
        for name in ("forward", "input_grad", "weight_grad", "head", "link")
    }
    for part in gather(own):
        for name, values in part.items():
            for segment, seconds in values.items():
                costs[name][segment] = seconds
    return costs


def _measure_segment(
    engine: LocalPipelineEngine, segment: int, hidden: Any, labels: Any
) -> dict[str, float]:
    module = engine.module
    module.train()
    parameters = list(module.segment_parameters(segment))
    hidden, wanted = _learning(Tree.of(hidden))  # ids do not learn
    outputs = Tree.of(module.run_segment(segment, hidden))
    shallow = module.shallow
    gradients = [torch.ones_like(slot) for slot in _with_graph(outputs)]

    def through(
        inputs: list[Tensor], context: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> float:
        """Forward and backward. autograd.grad, not backward: nothing may be added to the gradients
        of the run."""

        def run() -> None:
            # no_weight_grads: layers that can defer them would compute them although nobody asks
            with context():
                roots = _with_graph(Tree.of(module.run_segment(segment, hidden)))
                torch.autograd.grad(roots, inputs, gradients, allow_unused=True)

        return _seconds(run)

    forward = _seconds(lambda: module.run_segment(segment, hidden))
    backward = through([*wanted, *parameters]) - forward
    input_grad = through(wanted, no_weight_grads) - forward if wanted else backward / 2
    costs = {
        "forward": forward,
        "input_grad": max(0.0, input_grad),
        "weight_grad": max(0.0, backward - input_grad),
    }
    if module.has_loss(segment):
        arrived, learning = _learning(outputs)

        def head() -> None:
            loss = module.loss_of(segment, arrived, labels, shallow)
            torch.autograd.grad(
                loss, [*learning, *module.head_parameters(segment)], allow_unused=True
            )

        costs["head"] = _seconds(head)
    return costs


def _learning(tree: Tree) -> tuple[Any, list[Tensor]]:
    """The value with its floating-point tensors cut off from what made them, and these."""
    slots = [slot.detach().requires_grad_() for slot in tree.slots]
    return tree.with_slots(slots).value(), slots


def _with_graph(tree: Tree) -> list[Tensor]:
    return [slot for slot in tree.slots if slot.requires_grad]


def _measure_link(
    engine: LocalPipelineEngine, lower: int, inputs: Any, own: dict[str, dict[int, float]]
) -> Any:
    """Send messages over the link above a segment; the receiver times them."""
    link = engine.activation_links[lower]
    tags = [Tag(engine.global_steps, -1000 - n) for n in range(REPEATS)]
    if engine.stage_id == engine.module.stage_of[lower]:
        outputs, labels = map(Tree.of, inputs)
        message = engine.executor.message(lower, outputs, labels)
        for tag in tags:
            link.send(tag, message)
        link.flush()
        return inputs
    times = []
    for tag in tags:
        _, received = link.receive(tag)
        times.append(time.perf_counter())
    own.setdefault("link", {})[lower] = (times[-1] - times[1]) / (len(times) - 2)
    arrived = parts_of_activation(received)
    return arrived.hidden.value(), arrived.labels.value()


def most_held(engine: LocalPipelineEngine) -> dict[int, int]:
    """Stage -> the most bytes that one of its ranks has held. A collective call."""
    found: dict[int, int] = {}
    for stage, held in gather((engine.module.stage, peak_memory(engine.device))):
        found[stage] = max(found.get(stage, 0), held)
    return found


def _seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[2:])


def write(engine: LocalPipelineEngine, inputs: Any, folder: Path, seq_len: int) -> None:
    """profile.json and trace.json. A collective call; rank 0 writes.

    Args:
        inputs: as for `measure`.
        seq_len: tokens in a sequence.
    """
    recorded = list(engine.recorder.events) if engine.recorder else []
    costs: dict[str, Any] = measure(engine, inputs)
    sizes = [
        link.message_bytes
        for link in engine.activation_links.values()
        if hasattr(link, "message_bytes")
    ]
    parameters = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    gathered = gather(
        (engine.stage_id, engine.replica_id, recorded, max(sizes, default=0), parameters)
    )
    if engine.global_rank:
        return
    stages = {stage: events for stage, replica, events, *_ in gathered if replica == 0}
    costs["optimizer"] = [0.0] * engine.num_segments
    costs["activation_bytes"] = max(size for *_, size, _ in gathered)
    costs["forward"][0] += _typical(stages[0], "LoadMicroBatch")
    for stage, events in stages.items():
        segments = [s for s, at in enumerate(engine.module.stage_of) if at == stage]
        factor = _in_the_run(engine, stage, events, costs)
        for part, segment in product(("forward", "input_grad", "weight_grad", "head"), segments):
            costs[part][segment] *= factor
        costs["forward"][segments[-1]] += _typical(
            events, "SendActivation"
        )  # handing it over keeps the stage from computing
        costs["optimizer"][segments[0]] = _typical(events, "ReduceGrads") + _typical(
            events, "OptimizerStep"
        )
    layout = {
        "stages": engine.num_stages,
        "segments": engine.num_segments,
        "segment_parts": engine.module.segment_parts,
        "micro_batches": engine.micro_batches,
        "sequences": engine.train_micro_batch_size_per_gpu(),
        "seq_len": seq_len,
    }
    measured = {
        "step_seconds": [_period(stages[stage]) for stage in sorted(stages)],
        "update_seconds": [_typical(stages[stage], "OptimizerStep") for stage in sorted(stages)],
        "parameters": [count for _, replica, *_, count in gathered if replica == 0],
    }
    write_file(
        folder / "profile.json",
        strict_json.dumps({"layout": layout, "costs": costs, "measured": measured}, indent=1)
        + "\n",
    )
    write_file(folder / "trace.json", strict_json.dumps(_trace(gathered)))


def _in_the_run(
    engine: LocalPipelineEngine, stage: int, events: list[Event], costs: dict[str, Any]
) -> float:
    """How much longer a stage computed in a step than its parts take by themselves: gradients are
    added up, caches are cold."""
    alone = Costs(
        **{part: costs[part] for part in ("forward", "input_grad", "weight_grad", "head")}
    )
    seconds: defaultdict[int, float] = defaultdict(float)
    for name, step, start, end in events:
        seconds[step] += (end - start) * (name in COMPUTE)
    busy: dict[Any, float] = {}
    ratios = []
    for step in sorted(seconds)[1:]:  # the first may be incomplete, and pays for warm-up
        key = engine.plan.key_at(step)
        if key not in busy:
            busy[key] = simulate(engine.plan.schedule_at(step), alone).busy[stage]
        ratios.append(seconds[step] / busy[key])
    return median(ratios) if ratios else 1.0


def _typical(events: list[Event], wanted: str) -> float:
    """Median seconds of an instruction."""
    return median([end - start for name, _, start, end in events if name == wanted] or [0.0])


def _period(events: list[Event]) -> float | None:
    """Median seconds from one optimizer step to the next."""
    ends = [end for name, _, _, end in events if name == "OptimizerStep"]
    return median(b - a for a, b in pairwise(ends)) if len(ends) > 1 else None


def _trace(lanes: list[Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for stage, replica, events, *_ in lanes:
        rows.append(lane(stage, replica))
        rows += [
            span(name, stage, start, end, replica, args={"step": step})
            for name, step, start, end in events
        ]
    return {"traceEvents": rows}
