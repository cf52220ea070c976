"""The rest of ds_config.json: what must hold for it under a local pipeline.

DeepSpeed accepts misspelt top-level keys in silence, so those we or our users rely on are checked
here, and what DeepSpeed cannot do correctly under a pipeline is refused with the reason. What only
DeepSpeed's own classes know is checked in `engine/deepspeed_checks.py`. All of this happens before
any process group starts.

No torch, no DeepSpeed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ds_local.config.files import check_finite, leaves, nearest
from ds_local.config.lr_schedule import scheduler_of
from ds_local.config.schema import SECTION
from ds_local.errors import ConfigError

# Top-level keys of ds_config.json that DeepSpeed 0.19 reads and our users set. A key that looks
# like one of these but is not is taken for a slip of the pen; anything further off is left to the
# user.
DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "autotuning",
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
    "disable_python_gc",
    "dump_state",
    "elasticity",
    "expert_parallel",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "graph_harvesting",
    "hybrid_engine",
    "local_parallel",
    "log_level",
    "managed_gradient_accumulation",
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
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)

# those of them that are objects with keys of their own
SECTIONS = (
    "activation_checkpointing",
    "aio",
    "autotuning",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "data_types",
    "flops_profiler",
    "fp16",
    "hybrid_engine",
    "optimizer",
    "pipeline",
    "scheduler",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "wandb",
    "zero_optimization",
    SECTION,
)

# what is made by name -> the keys it takes, and an example of a name
_NAMED: dict[str, tuple[list[str], str]] = {
    "optimizer": (["type", "params", "legacy_fusion"], "AdamW"),
    "scheduler": (["type", "params"], "WarmupCosineLR"),
}

Path = tuple[str, ...]  # keys from the top down


def _offloads(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("device", "none") != "none"


def _is_not(*values: Any) -> Any:
    return lambda value: value not in values


def _above(limit: int) -> Any:
    return lambda value: isinstance(value, int) and value > limit


# (keys from the top down, is this value refused?, reason and remedy); a key that is absent is never
# refused
_REFUSED: tuple[tuple[Path, Any, str], ...] = (
    (
        ("fp16", "enabled"),
        bool,
        "fp16 needs an overflow check over all stages, and DeepSpeed leaves the loss unscaled "
        "under ZeRO-0; use bf16",
    ),
    (("torch_autocast", "enabled"), bool, "autocast is not wired into the stages; use bf16"),
    (
        ("zero_optimization", "stage"),
        _is_not(0, 1),
        "DeepSpeed's pipelines work with ZeRO stages 0 and 1 only; use 0 or 1",
    ),
    (
        ("zero_optimization", "offload_optimizer"),
        _offloads,
        "optimizer offload relies on backward hooks that a pipeline stage does not run; remove it",
    ),
    (
        ("zero_optimization", "cpu_offload"),
        bool,
        "optimizer offload relies on backward hooks that a pipeline stage does not run; remove it",
    ),
    (
        ("zero_optimization", "offload_param"),
        _offloads,
        "parameter offload is a ZeRO-3 feature; remove it",
    ),
    (
        ("zero_optimization", "cpu_offload_param"),
        bool,
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
    (
        ("pipeline", "stages"),
        _is_not("auto"),
        f"DeepSpeed does not read it; set {SECTION}.num_stages",
    ),
    (
        ("pipeline", "partition"),
        _is_not("best"),
        f"DeepSpeed does not read it; set {SECTION}.partition or {SECTION}.parts",
    ),
    (
        ("pipeline", "seed_layers"),
        bool,
        f"weights are seeded by layer already; set {SECTION}.seed",
    ),
    (("elasticity", "enabled"), bool, "DeepSpeed refuses elasticity with pipelines; remove it"),
    (
        ("data_efficiency", "enabled"),
        bool,
        "its samplers need a data loader on every stage; remove it",
    ),
    (("autotuning", "enabled"), bool, "it does not know pipelines; use scripts/plan.py"),
    (("hybrid_engine", "enabled"), bool, "it is for inference between steps; remove it"),
    (
        ("compile", "deepcompile"),
        bool,
        "DeepCompile works through ZeRO's hooks, which a pipeline stage does not run; set "
        f"{SECTION}.compile instead",
    ),
    (
        ("tensor_parallel", "autotp_size"),
        _above(1),
        "stages are not split by tensor parallelism; set it to 1",
    ),
    (("sequence_parallel_size",), _above(1), "stages do not split sequences; set it to 1"),
    (
        ("flops_profiler", "enabled"),
        bool,
        "it profiles forward passes that a local pipeline does not make; use scripts/train.py "
        "--profile for measured times, scripts/simulate.py --model for operations",
    ),
    (
        ("wall_clock_breakdown",),
        bool,
        "its timers are in passes that a local pipeline does not make and would show 0; use "
        "scripts/train.py --profile, and step_seconds and idle_share in metrics.jsonl",
    ),
    (
        ("checkpoint", "load_universal"),
        bool,
        "universal checkpoints do not know auxiliary heads; load weights with "
        "load_module_only=True",
    ),
    (
        ("checkpoint", "use_node_local_storage"),
        bool,
        "a checkpoint is one folder that all ranks see; give a path on a shared disk",
    ),
    (("checkpoint", "writer"), bool, "checkpoints are written by torch.save; remove it"),
    (
        ("managed_gradient_accumulation",),
        _is_not(True),
        "a pipeline counts its micro-batches itself; remove it",
    ),
)

# the same for what goes with fp32 and ZeRO stage 0 only
_FP32_ONLY: tuple[tuple[Path, Any, str], ...] = (
    (
        (SECTION, "clip_multipliers"),
        bool,
        "DeepSpeed's bf16 and ZeRO optimizers clip a whole stage at once; use lr_multipliers "
        "instead",
    ),
    (
        (SECTION, "diagnostics"),
        bool,
        "DeepSpeed's bf16 and ZeRO optimizers take gradients away as they arise; look at a run in "
        "fp32",
    ),
    (
        (SECTION, "replicas", "sync"),
        lambda v: v != "gradients",
        "DeepSpeed's bf16 and ZeRO optimizers shard their state over the very replicas that train "
        "apart; remove bf16 and zero_optimization, or use sync 'gradients'",
    ),
)
# keys from the top down -> (kind, least, most)
_NUMBERS: dict[Path, tuple[type, float, float]] = {
    ("train_batch_size",): (int, 1, math.inf),
    ("train_micro_batch_size_per_gpu",): (int, 1, 2**20),  # one is in memory at once
    ("gradient_accumulation_steps",): (int, 1, math.inf),
    ("gradient_clipping",): (float, 0, math.inf),
    ("gradient_predivide_factor",): (float, 2**-60, math.inf),
    ("steps_per_print",): (int, 1, math.inf),
    ("pipeline", "activation_checkpoint_interval"): (int, 0, math.inf),
}

# "auto" is for the command line of Hugging Face's Trainer: key -> what to write instead
_AUTO = {
    "train_batch_size": "leave it out",
    "train_micro_batch_size_per_gpu": "write a number of sequences (--per_device_train_batch_size)",
    "gradient_accumulation_steps": "write a number (--gradient_accumulation_steps)",
    "gradient_clipping": "write a number (--max_grad_norm), such as 1.0",
    "lr": "write a number (--learning_rate), such as 3e-4",
    "betas": "write two numbers (--adam_beta1, --adam_beta2), such as [0.9, 0.95]",
    "eps": "write a number (--adam_epsilon), such as 1e-8",
    "weight_decay": "write a number (--weight_decay), such as 0.1",
    "warmup_min_lr": "write 0",
    "warmup_max_lr": "write the optimizer's lr",
    "warmup_num_steps": "write a number of steps (--warmup_steps)",
    "total_num_steps": "write the number of steps of the run (--max_steps)",
    "enabled": "write true or false",
    "type": "write a name",
}
_OWN_AUTO = (  # where it means something
    ("pipeline", "stages"),
    ("data_types", "keep_in_fp32_modules"),
    (SECTION,),
)


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Refuse misspelt keys, wrong types and features that do not work under a local pipeline.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    for key in config:
        if key not in DEEPSPEED_KEYS:
            close = difflib.get_close_matches(str(key), DEEPSPEED_KEYS, n=1, cutoff=0.8)
            if close:
                raise ConfigError(f"{key!r} is not a DeepSpeed key; did you mean {close[0]!r}?")
    check_finite(config)
    for path, value in leaves(config):
        known = path[0] in DEEPSPEED_KEYS
        if value == "auto" and known and not any(path[: len(own)] == own for own in _OWN_AUTO):
            instead = _AUTO.get(path[-1], "remove it, so that DeepSpeed's default holds")
            raise ConfigError(
                f'{".".join(path)} is "auto", which only Hugging Face\'s Trainer fills in; '
                f"{instead}"
            )
    for key in SECTIONS:
        if not isinstance(config.get(key, {}), Mapping):
            hint = ', as in {"enabled": true}' if isinstance(config[key], bool) else ""
            raise ConfigError(
                f"{key} must be an object with keys of its own{hint}, got {config[key]!r}"
            )
    for section, (keys, example) in _NAMED.items():
        for key in config.get(section, {}):
            if key not in keys:
                raise ConfigError(
                    f"{section}.{key} is not a key DeepSpeed knows; {nearest(str(key), keys)}"
                )
        if section in config and not config[section].get("type"):
            raise ConfigError(f'{section} has no type; write one, such as "type": "{example}"')
    for path, (kind, least, most) in _NUMBERS.items():
        value = _at(config, path)
        if value is not None:
            check_number(".".join(path), value, kind, least, most)
    scheduler_of(config)
    _refuse(config, _REFUSED, "")
    if bf16_enabled(config) or zero_stage(config):
        _refuse(config, _FP32_ONLY, ", which needs fp32 and ZeRO stage 0")


def bf16_enabled(config: Mapping[str, Any]) -> bool:
    return any(bool(_at(config, (key, "enabled"))) for key in ("bf16", "bfloat16"))


def zero_stage(config: Mapping[str, Any]) -> int:
    return _at(config, ("zero_optimization", "stage")) or 0


def check_number(
    name: str, value: Any, kind: type = int, least: float = 1, most: float = math.inf
) -> None:
    """Raises ConfigError when `value` is no `kind` (int, or float for any number) between the
    bounds."""
    right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not right or not least <= value <= most:
        what = "an integer" if kind is int else "a number"
        bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise ConfigError(f"{name} must be {what} of {bounds}, got {value!r}")


def _refuse(
    config: Mapping[str, Any], table: tuple[tuple[Path, Any, str], ...], needs: str
) -> None:
    for path, wrong, reason in table:
        found = _at(config, path)
        if found is not None and wrong(found):
            raise ConfigError(f"{'.'.join(path)} is {found!r}{needs}: {reason}")


def _at(config: Any, path: Path) -> Any:
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
            "set train_micro_batch_size_per_gpu and gradient_accumulation_steps, or "
            "train_batch_size"
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
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation} x {num_replicas} replicas; change one of "
            "them, or leave train_batch_size out"
        )
    return micro, accumulation
