"""A run that moves from layout to layout, on warm ranks, and what is left of it: losses, and every
tensor by its lasting name. Imports are inside, since the ranks import this file."""

from __future__ import annotations

from typing import Any, NamedTuple

STEPS = 3  # on each layout
TOTAL = 4  # micro-batches of a step, over all replicas
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32 ZeRO-1": {"zero_optimization": {"stage": 1}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 ZeRO-1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
}
SCHEDULER = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-2}}
}


class Layout(NamedTuple):
    stages: int
    replicas: int = 1
    per_stage: int = 1
    kind: str = "fp32"

    @property
    def ranks(self) -> int:
        return self.stages * self.replicas

    def __str__(self) -> str:
        return f"{self.stages} stages x {self.replicas}, {self.per_stage} each, {self.kind}"


def leg(
    folder: str,
    layout: tuple[Any, ...],
    section: dict[str, Any],
    resume: bool = False,
    steps: int = STEPS,
    total: int = TOTAL,
    clip: float | None = None,
    save: bool = True,
    dies: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train some steps on a layout, from its checkpoint or from the beginning, and save.

    Args:
        dies: the rank that is gone in the middle of the move.
    """
    import jobs
    import torch
    from reference import batch

    layout = Layout(*layout)
    if clip is None:  # DeepSpeed's bf16 and ZeRO clip a stage as one, so the norm moves with it
        clip = 1.0 if layout.kind == "fp32" else 0.0
    settings = {"gradient_clipping": clip, **SCHEDULER, **KINDS[layout.kind], **settings}
    section = {**section, "segments_per_stage": layout.per_stage}
    engine = jobs.build(section, layout.stages, gas=total // layout.replicas, **settings)
    if resume:
        if dies is not None:
            _die_while_moving(dies)
        engine.load_checkpoint(folder)
    loaded = tensors(engine)

    def batches() -> Any:
        step = engine.global_steps
        while True:
            for micro_batch in range(engine.micro_batches):
                yield batch(step, micro_batch * layout.replicas + engine.replica_id, 0)
            step += 1

    data = batches() if engine.is_first_stage() else None
    losses: dict[tuple[int, int], float] = {}
    for _ in range(steps):
        engine.train_batch(data)
        for segment, loss in engine.segment_losses.items():
            losses[engine.global_steps, segment] = loss.item()
    if save:
        engine.save_checkpoint(folder)
        engine.wait_for_save()
    torch.distributed.barrier()  # nobody leaves while another still sends
    return {
        "losses": losses,
        "loaded": loaded,
        "left": tensors(engine),
        "moved": engine.moved,
        "step": engine.global_steps,
        "lr": engine.get_lr()[0],
        "replica": engine.replica_id,
        "cut": engine.module.segment_parts,
    }


def _die_while_moving(rank: int) -> None:
    import os
    import signal

    import torch

    from ds_local.engine.moving import Move

    state = Move._state

    def half(self: Any, *args: Any) -> Any:
        if torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return state(self, *args)

    Move._state = half  # type: ignore[method-assign]


def tensors(engine: Any) -> dict[tuple[str, str, int], Any]:
    """(lasting name, key, first element) -> values, of what this rank holds."""
    from ds_local.engine.deepspeed_seam import shares_of
    from ds_local.model.names import lasting_name

    parts = engine.module.segment_parts
    found: dict[tuple[str, str, int], Any] = {}
    names = {}
    for name, parameter in engine.module.named_parameters():
        names[parameter] = lasting_name(name, parts)
        found[names[parameter], "weights", 0] = parameter.detach().float().flatten().clone()
    for group in shares_of(engine.optimizer):
        for share in (one for one in group if one.length):
            name, stretch = names[share.parameter], slice(share.offset, share.offset + share.length)
            state = engine.basic_optimizer.state.get(share.holder, {})
            if share.holder is not share.parameter:
                state = {**state, "masters": share.holder}
            for key, value in state.items():
                if key == "step":
                    found[name, key, 0] = value.clone().view(1)
                else:
                    found[name, key, share.start] = value.detach().flatten()[stretch].clone()
    return found


def joined(results: list[dict[str, Any]], which: str = "left") -> dict[tuple[str, str], Any]:
    """(name, key) -> whole tensor, from all ranks' pieces."""
    import torch

    pieces: dict[tuple[str, str], dict[int, Any]] = {}
    for result in results:
        for (name, key, start), values in result[which].items():
            pieces.setdefault((name, key), {})[start] = values
    return {at: torch.cat([found[s] for s in sorted(found)]) for at, found in pieces.items()}


def losses_of(results: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """(step, segment) -> loss, of replica 0."""
    return {at: v for one in results if one["replica"] == 0 for at, v in one["losses"].items()}


def differing(one: dict[Any, Any], other: dict[Any, Any]) -> list[Any]:
    """What is not the same, to the bit, in two results of `joined`."""
    import torch

    return sorted(
        at
        for at in one.keys() | other.keys()
        if at not in one or at not in other or not torch.equal(one[at], other[at])
    )
