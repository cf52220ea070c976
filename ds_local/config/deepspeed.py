"""The rest of ds_config.json: what must hold for it under a local pipeline.

DeepSpeed accepts misspelt top-level keys in silence, so those we or our users rely on are checked
here, and what DeepSpeed cannot do correctly under a pipeline is refused with the reason. All of
this happens before any process group starts.

No torch, no DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ds_local.config.schema import SECTION
from ds_local.errors import ConfigError

# Top-level keys of ds_config.json that DeepSpeed 0.19 reads and our users set. A key that looks
# like one of these but is not is taken for a slip of the pen; anything further off is left to the
# user.
DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "data_types",
    "dataloader_drop_last",
    "disable_allgather",
    "dump_state",
    "elasticity",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "graph_harvesting",
    "local_parallel",
    "memory_breakdown",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sparse_attention",
    "sparse_gradients",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


def _offloads(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("device", "none") != "none"


# (keys from the top down, is this value refused?, reason and remedy); a key that is absent is never
# refused
_REFUSED: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (
        ("fp16", "enabled"),
        bool,
        "fp16 needs an overflow check over all stages, and DeepSpeed leaves the loss unscaled under ZeRO-0; use bf16",
    ),
    (("torch_autocast", "enabled"), bool, "autocast is not wired into the stages; use bf16"),
    (
        ("zero_optimization", "stage"),
        lambda v: v not in (0, 1),
        "DeepSpeed's pipelines work with ZeRO stages 0 and 1 only; use 0 or 1",
    ),
    (
        ("zero_optimization", "offload_optimizer"),
        _offloads,
        "optimizer offload relies on backward hooks that a pipeline stage does not run; remove it",
    ),
    (
        ("zero_optimization", "offload_param"),
        _offloads,
        "parameter offload is a ZeRO-3 feature; remove it",
    ),
    (
        ("pipeline", "pipe_partitioned"),
        bool,
        "partitioned activations need a tensor-parallel axis; remove it",
    ),
    (
        ("pipeline", "grad_partitioned"),
        bool,
        "partitioned gradients need a tensor-parallel axis; remove it",
    ),
    (
        ("pipeline", "use_reentrant"),
        bool,
        "reentrant checkpointing is cut off by detached stage inputs; remove it",
    ),
    (("elasticity", "enabled"), bool, "DeepSpeed refuses elasticity with pipelines; remove it"),
    (
        ("data_efficiency", "enabled"),
        bool,
        "its samplers need a data loader on every stage; remove it",
    ),
    (
        ("compile", "deepcompile"),
        bool,
        f"DeepCompile works through ZeRO's hooks, which a pipeline stage does not run; set {SECTION}.compile instead",
    ),
    (
        ("tensor_parallel", "autotp_size"),
        lambda v: isinstance(v, int) and v > 1,
        "stages are not split by tensor parallelism; set it to 1",
    ),
)

# the same for what goes with fp32 and ZeRO stage 0 only
_FP32_ONLY: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (
        (SECTION, "clip_multipliers"),
        bool,
        "DeepSpeed's bf16 and ZeRO optimizers clip a whole stage at once; use lr_multipliers instead",
    ),
    (
        (SECTION, "diagnostics"),
        bool,
        "DeepSpeed's bf16 and ZeRO optimizers take gradients away as they arise; look at a run in fp32",
    ),
    (
        (SECTION, "replicas", "sync"),
        lambda v: v != "gradients",
        "DeepSpeed's bf16 and ZeRO optimizers shard their state over the very replicas that train apart; remove bf16 and "
        "zero_optimization, or use sync 'gradients'",
    ),
)
_NUMBERS = {
    "train_batch_size": (int, 1),
    "train_micro_batch_size_per_gpu": (int, 1),
    "gradient_accumulation_steps": (int, 1),
    "gradient_clipping": (float, 0),
    "steps_per_print": (int, 1),
}


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Refuse misspelt keys, wrong types and features that do not work under a local pipeline.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    for key in config:
        if key not in DEEPSPEED_KEYS:
            close = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.8)
            if close:
                raise ConfigError(f"{key!r} is not a DeepSpeed key; did you mean {close[0]!r}?")
    for key in ("bf16", "bfloat16", "zero_optimization", "pipeline", SECTION):
        if not isinstance(config.get(key, {}), Mapping):
            raise ConfigError(f"{key} must be an object with keys of its own, got {config[key]!r}")
    for key, (kind, least) in _NUMBERS.items():
        value = config.get(key)
        if value is None:
            continue
        right = isinstance(value, int if kind is int else int | float) and not isinstance(
            value, bool
        )
        if not right or value < least:
            raise ConfigError(
                f"{key} must be {'an integer' if kind is int else 'a number'} of at least {least}, got {value!r}"
            )
    _refuse(config, _REFUSED, "")
    if any(
        _at(config, path)
        for path in (("bf16", "enabled"), ("bfloat16", "enabled"), ("zero_optimization", "stage"))
    ):
        _refuse(config, _FP32_ONLY, ", which needs fp32 and ZeRO stage 0")


def _refuse(
    config: Mapping[str, Any], table: tuple[tuple[tuple[str, ...], Any, str], ...], needs: str
) -> None:
    for path, wrong, reason in table:
        found = _at(config, path)
        if found is not None and wrong(found):
            raise ConfigError(f"{'.'.join(path)} is {found!r}{needs}: {reason}")


def _at(config: Any, path: tuple[str, ...]) -> Any:
    """The value under these keys from the top down, None when there is none."""
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def batch_sizes(config: Mapping[str, Any], num_replicas: int) -> tuple[int, int]:
    """(sequences per micro-batch, micro-batches per step), from any two of DeepSpeed's three batch
    keys.

    Raises:
        ConfigError: when they contradict each other or the number of replicas.
    """
    total = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    if total is None and micro is None:
        raise ConfigError(
            "set train_micro_batch_size_per_gpu and gradient_accumulation_steps, or train_batch_size"
        )
    if micro is None:
        accumulation = accumulation or 1
        micro = (total or 0) // (accumulation * num_replicas)
    elif accumulation is None:
        accumulation = 1 if total is None else total // (micro * num_replicas)
    if (
        not micro
        or not accumulation
        or (total is not None and total != micro * accumulation * num_replicas)
    ):
        raise ConfigError(
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {num_replicas} replicas; change one of them, or leave train_batch_size out"
        )
    return micro, accumulation
