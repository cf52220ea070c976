"""Functions that run on the ranks of a test; imports are inside, since the ranks import this
file."""

from __future__ import annotations

from typing import Any

from reference import EPSILON, MODELS, batch

PRECISIONS: dict[str, dict[str, Any]] = {  # with an optimizer of DeepSpeed
    "fp32 ZeRO-1": {"zero_optimization": {"stage": 1}},
    "bf16 ZeRO-0": {"bf16": {"enabled": True}},
    "bf16 ZeRO-1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "bf16 ZeRO-1, fp32 sums": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}


def ds_config(section: dict[str, Any], gas: int = 4, **extra: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "steps_per_print": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "eps": EPSILON, "weight_decay": 0.0, "torch_adam": True},
        },
        "local_parallel": section,
        **extra,
    }


def build(
    section: dict[str, Any],
    stages: int,
    family: str = "gpt2",
    gas: int = 4,
    model: Any = None,
    token_counts: Any = None,
    recompute: int = 0,
    **extra: Any,
) -> Any:
    """An engine on this rank."""
    import ds_local

    config = ds_config(section, gas, **extra)
    module = ds_local.causal_lm(
        {**MODELS[family], **(model or {})},
        num_stages=stages,
        config=config,
        activation_checkpoint_interval=recompute,
        token_counts=token_counts,
    )
    return ds_local.initialize(model=module, config=config)[0]


def batches(engine: Any, start: int = 0) -> Any:
    """This replica's micro-batches from step `start` on, None on stages that read none."""
    if not engine.is_first_stage():
        return None

    def generate():
        step = start
        while True:
            for micro_batch in range(engine.micro_batches):
                yield batch(step, micro_batch, engine.replica_id)
            step += 1

    return generate()


def state_of(engine: Any) -> dict[str, Any]:
    """This rank's parameters, layers by their number in the whole model."""
    state = {}
    for name, parameter in engine.module.named_parameters():
        state[name] = parameter.detach().float().cpu().clone()
    return state


def train(section: dict[str, Any], stages: int, steps: int, **settings: Any) -> dict[str, Any]:
    """Train and report: losses of every step as rank 0 sees them, own losses, evaluation,
    parameters."""
    engine = build(section, stages, **settings)
    reports: list[Any] = []
    engine.reports.listeners.append(lambda rows: reports.append({r.segment: r.loss for r in rows}))
    data = batches(engine)
    own = []
    for _ in range(steps):
        loss = engine.train_batch(data)
        own.append(loss.item() if engine.has_loss else None)
    engine.eval_batch(batches(engine, start=10_000))
    return {
        "reports": reports,
        "own": own,
        "eval": engine.eval_losses,
        "state": state_of(engine),
        "parts": engine.module.segment_parts,
        "stage": engine.stage_id,
        "live": len(engine.executor.live),
    }
