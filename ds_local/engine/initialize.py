"""`initialize`: an engine for a `LocalPipelineModule`, as `deepspeed.initialize` makes them for
other modules."""

from __future__ import annotations

import os
import shutil
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig

from ds_local.config.deepspeed import batch_sizes, check_deepspeed
from ds_local.config.files import load_config, local_parallel
from ds_local.config.schema import SECTION
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.module import LocalPipelineModule
from ds_local.errors import ConfigError
from ds_local.replicas.subnets import make_sync


def initialize(
    args: Any = None,
    model: LocalPipelineModule | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[LocalPipelineEngine, Any, Any, Any]:
    """`deepspeed.initialize` for a `LocalPipelineModule`: the same arguments, the same 4-tuple.

    DeepSpeed picks its engine class by itself, so the few steps it takes around that are taken
    here.

    Returns:
        (engine, optimizer, training data loader, learning-rate scheduler).

    Raises:
        ConfigError: for a model of another kind, or a configuration that cannot work.
    """
    if not isinstance(model, LocalPipelineModule) or mpu is not None or mesh_param is not None:
        raise ConfigError(
            f"ds_local.initialize takes a LocalPipelineModule and neither mpu nor mesh_param, got {type(model).__name__}"
        )
    source = (
        config
        if config is not None
        else config_params
        if config_params is not None
        else getattr(args, "deepspeed_config", None)
    )
    if source is None:
        raise ConfigError("pass config=..., or args with --deepspeed_config")
    ds_config = load_config(source)
    check_deepspeed(ds_config)
    if local_parallel(ds_config) != model.section:
        raise ConfigError(
            "the module was built with another local_parallel section; pass both the same config"
        )
    if model.section.compile and get_accelerator().device_name() == "cpu" and not _cpp_compiler():
        raise ConfigError(
            f"{SECTION}.compile needs a C++ compiler on a CPU and there is none; install g++, or remove the key"
        )
    batch_sizes(ds_config, model.mpu().get_data_parallel_world_size())
    bf16 = ds_config.get("bf16", ds_config.get("bfloat16", {}))
    config_class = DeepSpeedConfig(ds_config, model.mpu())
    if bf16.get("enabled"):
        # the hand-over from bf16 to fp32 gradients must happen in every pass, on every stage: as a
        # hook of the parameters
        config_class.bfloat16_config.immediate_grad_update = True
    deepspeed.set_optimizer_flags(config_class, model)
    if model.section.scales_learning_rates and (
        model_parameters is not None or optimizer is not None
    ):
        raise ConfigError(
            "local_parallel.lr_multipliers and warmup_stagger need parameter groups by segment, which initialize makes for the "
            "optimizer of the config; leave optimizer and model_parameters out, or scale the rates of your own groups"
        )
    if model.section.scales_learning_rates:
        model_parameters = [
            {"params": list(model.segment_parameters(segment)), "segment": segment}
            for segment in model.local_segments
        ]
    engine = LocalPipelineEngine(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=model.mpu(),
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=ds_config,
        config_class=config_class,
    )
    engine.replicas = make_sync(engine)
    engine._configure_python_gc()
    if model.section.compile:
        engine.compile()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _cpp_compiler() -> str | None:
    """What torch's compiler would use on a CPU."""
    return os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
    )
