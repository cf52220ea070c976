"""What a run is about to do, for the console at its start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ds_local.config.catalog import in_words
from ds_local.config.deepspeed import precision_of
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.errors import counted
from ds_local.links.agreement import gather
from ds_local.model.flops import segment_times, unit_flops
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.simulator import Costs, simulate

_SHOWN = 8  # stages one by one; of more the least and the most
_SIMULATED = 2**15  # forwards of a step; larger ones are not worth the wait


class Length(NamedTuple):
    """How long a run is."""

    steps: int
    per_step: int  # sequences of a step, all replicas together
    seq_len: int
    sequences: int  # of an epoch
    begun: tuple[int, int] = (0, 0)  # steps and sequences before this start

    def resumed(self, step: int, seen: int, epochs: float | None) -> Length:
        """The length of a run that is at `step`, after `seen` sequences: its steps may have had
        another size.

        Args:
            epochs: that the run takes, in all; None: its steps are as they are.
        """
        steps = self.steps
        if epochs is not None:
            left = math.ceil(epochs * self.sequences - seen)
            steps = step + max(0, math.ceil(left / self.per_step))
        return self._replace(steps=steps, begun=(step, seen))

    def __str__(self) -> str:
        step, seen = self.begun
        seen += max(0, self.steps - step) * self.per_step
        tokens, epochs = seen * self.seq_len, seen / self.sequences
        return (
            f"{self.steps:,} of {self.per_step} x {self.seq_len} tokens: {tokens:,} tokens, "
            f"{epochs:.3g} epochs of {self.sequences:,} sequences"
        )


def parameters_of(engine: LocalPipelineEngine) -> dict[str, list[int]]:
    """Parameters of every stage, for run.json: those of the model, and those of auxiliary heads. A
    collective call."""
    heads = sum(p.numel() for p in engine.module.heads.parameters())
    whole = sum(p.numel() for p in engine.module.parameters())
    found = {
        stage: (own - of, of) for stage, own, of in gather((engine.module.stage, whole, heads))
    }
    model, auxiliary = zip(*(found[stage] for stage in sorted(found)), strict=True)
    return {"parameters": list(model), "head_parameters": list(auxiliary)}


class PhaseForecast(NamedTuple):
    """What a scheme of the run comes to."""

    first_step: int
    words: str
    idle: list[float] | None  # predicted share of each stage; None: too large to simulate


def forecast(
    plan: RunPlan, hf_config: Any, parts: Sequence[int], seq_len: int
) -> list[PhaseForecast]:
    """Of every phase: the scheme in words, and the idle shares that the simulator finds with the
    stages' floating-point operations and links that cost nothing."""
    unit = unit_flops(hf_config, plan.section.head, plan.num_segments, seq_len)
    forward, input_grad, weight_grad, head = segment_times(unit, parts)
    costs = Costs(forward, input_grad, weight_grad, head)
    found = []
    for start, scheme in plan.section.schemes():
        schedules = [plan.schedule_at(start + n) for n in range(scheme.period)]
        size = plan.num_segments * plan.num_micro_batches * len(schedules)
        idle = simulate(schedules, costs).idle_share_of_stage if size <= _SIMULATED else None
        words = in_words(scheme.model_dump(), schedules[0].name)
        found.append(PhaseForecast(start, words, idle))
    return found


def banner(
    facts: Mapping[str, Any],
    phases: Sequence[PhaseForecast],
    length: Length,
    step: int,
    clipping: float,
    args: Any,
) -> str:
    """A few lines.

    Args:
        facts: as run.json has them, of a start.
        step: that it begins at.
        clipping: of gradients by their norm, which DeepSpeed does at 1 by default; 0: none.
        args: of `scripts/train.py`.
    """
    rows = [
        ("model", _model(facts, step)),
        ("stages", _stages(facts["layout"], facts["machine"]["device"])),
        *_schemes([phase for phase in phases if phase.first_step < length.steps]),
        ("steps", str(length)),
        ("learning rate", _rate(facts["config"], clipping, length.steps)),
        ("validation", _validation(args)),
    ]
    return "\n".join(f"  {name:<14}{text}" for name, text in rows)


def _model(facts: Mapping[str, Any], step: int) -> str:
    layout, config = facts["layout"], facts["config"]
    origin = f"from the weights of {facts['weights']}" if facts["weights"] else "fresh weights"
    origin = f"as it was at step {step}" if step else origin
    auxiliary = sum(layout["head_parameters"])
    heads = f" and {auxiliary:,} in auxiliary heads" if auxiliary else ""
    return (
        f"{facts['model']['model_type']}, {sum(layout['parameters']):,} parameters{heads}, "
        f"{precision_of(config)}, {origin}"
    )


def _stages(layout: Mapping[str, Any], device: str) -> str:
    pairs = list(zip(layout["parameters"], layout["head_parameters"], strict=True))
    count, replicas = layout["stages"], layout["replicas"]
    size = f"{count} x {counted(replicas, 'replica')} on {device}: "
    if count > _SHOWN:
        whole = [own + head for own, head in pairs]
        return size + f"{min(whole):,} to {max(whole):,} parameters each, heads included"
    each = (f"{own:,}{f' + head {head:,}' if head else ''}" for own, head in pairs)
    return size + "; ".join(each)


def _schemes(phases: Sequence[PhaseForecast]) -> Iterator[tuple[str, str]]:
    for phase in phases:
        begins = f"from step {phase.first_step} on, " if phase.first_step else ""
        yield "scheme", begins + phase.words
        if phase.idle is not None:
            mean = sum(phase.idle) / len(phase.idle)
            shown = phase.idle if len(phase.idle) <= _SHOWN else [min(phase.idle), max(phase.idle)]
            each = (", " if len(phase.idle) <= _SHOWN else " to ").join(f"{x:.0%}" for x in shown)
            yield "idle", f"{mean:.0%} predicted ({each}), if links cost nothing"


def _rate(config: Mapping[str, Any], clipping: float, steps: int) -> str:
    rate = (config["optimizer"].get("params") or {}).get("lr")
    optimizer = f"{config['optimizer']['type']}{f', {rate:g}' if rate is not None else ''}"
    optimizer += f", gradients clipped at {clipping:g}" if clipping else ""
    scheduler = config.get("scheduler")
    if not scheduler:
        return f"{optimizer}, the same in every step"
    given = scheduler.get("params") or {}
    params = ", ".join(f"{key} {value}" for key, value in given.items())
    other = given.get("total_num_steps", steps) != steps
    ends = f" (but the run has {steps:,} steps)" if other else ""
    return f"{optimizer}; {scheduler['type']}: {params}{ends}"


def _validation(args: Any) -> str:
    sequences = f"{args.eval_sequences:,}" if args.eval_sequences else "all"
    often = f"at step 0, every {args.eval_every} steps and" if args.eval_every else "only"
    return f"{often} at the end, on {sequences} sequences"
