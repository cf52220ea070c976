"""`initialize`: an engine for a `LocalPipelineModule`, as `deepspeed.initialize` makes them for
other modules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from deepspeed.utils import log_dist

from ds_local.cluster.surroundings import builds_of, check_builds
from ds_local.config.deepspeed import batch_sizes, bf16_enabled, zero_stage
from ds_local.config.lr_schedule import scheduler_of
from ds_local.engine.deepspeed_checks import checked, unread
from ds_local.engine.deepspeed_seam import engine_config
from ds_local.engine.engine import LocalPipelineEngine
from ds_local.engine.loaders import data_for
from ds_local.engine.module import LocalPipelineModule
from ds_local.engine.optimizer_checks import check_client_parts
from ds_local.engine.process_group import limit_waits
from ds_local.errors import ConfigError
from ds_local.links.agreement import together
from ds_local.links.failures import meeting
from ds_local.links.store_guard import store_guard
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
        ConfigError: for a model or data of another kind, or a configuration that cannot work.
    """
    if not isinstance(model, LocalPipelineModule) or mpu is not None or mesh_param is not None:
        raise ConfigError(
            "ds_local.initialize takes a LocalPipelineModule and neither mpu nor mesh_param, got "
            f"{type(model).__name__}"
        )
    given = (config, config_params, getattr(args, "deepspeed_config", None))
    source = next((one for one in given if one is not None), None)
    if source is None:
        raise ConfigError("pass config=..., or args with --deepspeed_config")
    ds_config, section = checked(source)
    if section != model.section:
        raise ConfigError(
            "the module was built with another local_parallel section; pass both the same config"
        )
    check_client_parts(ds_config, optimizer, lr_scheduler)
    if optimizer is None:
        check_builds(builds_of(ds_config))
    num_replicas, replica = model.grid.data_parallel_size, model.grid.get_data_parallel_id()
    batch_size, _ = batch_sizes(ds_config, num_replicas)
    data, stream = data_for(training_data, batch_size, collate_fn, replica, num_replicas)
    if model.section.scales_learning_rates and (
        model_parameters is not None or optimizer is not None
    ):
        raise ConfigError(
            "local_parallel.lr_multipliers, warmup_stagger and delay_discount need parameter "
            "groups by segment, which initialize makes for the optimizer of the config; leave "
            "optimizer and model_parameters out, or scale the rates of your own groups"
        )
    if model.section.scales_learning_rates:
        model_parameters = [
            {"params": list(model.segment_parameters(segment)), "segment": segment}
            for segment in model.local_segments
        ]
    together(lambda: _check_learns(model, ds_config))
    what = "the making of the engine"
    with meeting(what), store_guard(what, section.link.wait_seconds):
        engine = LocalPipelineEngine(
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=data,
            lr_scheduler=lr_scheduler or scheduler_of(ds_config),
            mpu=model.grid,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=ds_config,
            config_class=engine_config(ds_config, model),
        )
        engine.replicas = make_sync(engine)
    if stream is not None:
        engine.set_dataloader(stream)
        engine.training_dataloader = stream  # on the stages between first and last too
    limit_waits(section.link.wait_seconds)
    for note in (*engine.plan.notes, *unread(ds_config)):
        log_dist(note, ranks=[0], level=logging.WARNING)
    engine.configure_garbage_collection()
    if section.compile:
        engine.compile()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check_learns(model: LocalPipelineModule, ds_config: Mapping[str, Any]) -> None:
    if "optimizer" in ds_config and not any(True for _ in model.parameters()):
        raise ConfigError(
            f"stage {model.stage_id} has no weights, and its optimizer needs some; cut the model "
            "so that each stage has a layer with weights"
        )
    shards = bf16_enabled(ds_config) or zero_stage(ds_config)
    if shards and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"stage {model.stage_id} has no parameter that learns, and DeepSpeed's bf16 and ZeRO "
            "optimizers need one on every stage; train in fp32 without ZeRO, or cut the model so "
            "that each stage has one"
        )
