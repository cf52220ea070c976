"""What ds_config.json may say under a local pipeline, as tables: keys, numbers, refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_local.config.strict import SECTION

# Top-level keys of ds_config.json that are objects with keys of their own
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

# All top-level keys that DeepSpeed 0.19 reads and our users set. A key that looks like one of these
# but is not is taken for a slip of the pen; anything further off is left to the user.
DEEPSPEED_KEYS = (
    *SECTIONS,
    "communication_data_type",
    "dataloader_drop_last",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "elasticity",
    "expert_parallel",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "graph_harvesting",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sparse_attention",
    "sparse_gradients",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)

# what is made by name -> the keys it takes, and an example of a name
NAMED: dict[str, tuple[list[str], str]] = {
    "optimizer": (["type", "params", "legacy_fusion"], "AdamW"),
    "scheduler": (["type", "params"], "WarmupCosineLR"),
}

Path = tuple[str, ...]  # keys from the top down


def _offloads(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("device", "none") != "none"


def _is_not(*values: Any) -> Any:
    return lambda value: value not in values


def _several(value: Any) -> bool:
    return isinstance(value, int) and value > 1


_CHECKPOINTING = (
    "layers are recomputed by torch's checkpointing, which does not know it; remove it, and set "
    "pipeline.activation_checkpoint_interval"
)
_OPTIMIZER_OFFLOAD = (
    "optimizer offload relies on backward hooks that a pipeline stage does not run; remove it"
)
_PARAMETER_OFFLOAD = "parameter offload is a ZeRO-3 feature; remove it"

# (keys from the top down, is this value refused?, reason and remedy); a key that is absent is never
# refused
REFUSED: tuple[tuple[Path, Any, str], ...] = (
    (
        ("fp16", "enabled"),
        bool,
        "fp16 needs an overflow check over all stages, and DeepSpeed leaves the loss unscaled "
        "under ZeRO-0; use bf16",
    ),
    (("bf16", "check_grad_overflow"), _is_not(True), "it is always checked; remove it"),
    (("torch_autocast", "enabled"), bool, "autocast is not wired into the stages; use bf16"),
    (
        ("zero_optimization", "stage"),
        _is_not(0, 1),
        "DeepSpeed's pipelines work with ZeRO stages 0 and 1 only; use 0 or 1",
    ),
    (("zero_optimization", "offload_optimizer"), _offloads, _OPTIMIZER_OFFLOAD),
    (("zero_optimization", "cpu_offload"), bool, _OPTIMIZER_OFFLOAD),
    (("zero_optimization", "offload_param"), _offloads, _PARAMETER_OFFLOAD),
    (("zero_optimization", "cpu_offload_param"), bool, _PARAMETER_OFFLOAD),
    (
        ("zero_optimization", "zenflow"),
        bool,
        "its optimizer steps apart from the engine that it knows; remove it",
    ),
    *(
        (("activation_checkpointing", option), bool, _CHECKPOINTING)
        for option in (
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
            "cpu_checkpointing",
        )
    ),
    (
        ("expert_parallel", "enabled"),
        bool,
        "experts stay with their block and are not dealt out to ranks; remove it",
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
        _several,
        "stages are not split by tensor parallelism; set it to 1",
    ),
    (("sequence_parallel_size",), _several, "stages do not split sequences; set it to 1"),
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
    (
        ("checkpoint", "writer"),
        bool,
        "checkpoints are written by torch.save; remove it, and set "
        "local_parallel.async_save to have them written beside training",
    ),
    (
        ("managed_gradient_accumulation",),
        _is_not(True),
        "a pipeline counts its micro-batches itself; remove it",
    ),
)

# the same for what goes with fp32 and ZeRO stage 0 only
FP32_ONLY: tuple[tuple[Path, Any, str], ...] = (
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
NUMBERS: dict[Path, tuple[type, float, float]] = {
    ("train_batch_size",): (int, 1, math.inf),
    ("train_micro_batch_size_per_gpu",): (int, 1, 2**20),  # one is in memory at once
    ("gradient_accumulation_steps",): (int, 1, math.inf),
    ("gradient_clipping",): (float, 0, math.inf),
    ("gradient_predivide_factor",): (float, 2**-60, math.inf),
    ("steps_per_print",): (int, 1, math.inf),
    ("pipeline", "activation_checkpoint_interval"): (int, 0, math.inf),
}

# "auto" is for the command line of Hugging Face's Trainer: key -> what to write instead
AUTO = {
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

OWN_AUTO = (  # where it means something
    ("pipeline", "stages"),
    ("data_types", "keep_in_fp32_modules"),
    (SECTION,),
)
