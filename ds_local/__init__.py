"""ds_local: train each pipeline stage on its own language-model loss, under DeepSpeed, without a
pipeline bubble.

Reading order, one room after the other; a room imports only from rooms above it
    errors       every error of ours
    outputs      what we write: whole or not at all, and only over what we made
    config       the "local_parallel" section and the rest of ds_config.json that we rely on
    charts       pictures without a plotting library, for pages and docs
    schedules    routes: which loss trains which segment; the compute order as data; what it costs
    links        what travels between stages, how it is packed, who is waited for
    model        a Hugging Face model as pipeline layers, heads, what they cost, where to cut
    replicas     the data-parallel axis: together, or apart on weights of their own
    data         text -> tokens -> sequences -> micro-batches
    cluster      is everybody here, and the same? which layout is fastest?
    checkpoints  what a run leaves behind: checkpoints, metrics, Hugging Face folders
    engine       runs it all under DeepSpeed
    training     the loop around it, profiles, pictures, the report of a run
    measure      benchmarks beside other pipelines, and the ranks they run on
    study        methods beside each other on equal tokens: what they cost in quality
    cli          the commands

Words
    segment: the part that a loss trains as a whole; K of them · stage: pipeline rank, holds
        `segments_per_stage` segments · unit: stages between which gradients cross, perhaps a
        job of its own ·
    replica: data-parallel copy of a stage · micro-batch · step: one optimizer step · tick: column
        of a schedule grid ·
    action: ours, becomes a DeepSpeed instruction · head: auxiliary head · readout: hidden ->
        vocabulary matrix ·
    window: N or k of a row · chunk: segments sharing a loss · block: one decoder layer.
    Sizes: B sequences, T tokens, D hidden, V vocabulary.
"""

import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ds_local.cli.train import train
    from ds_local.config.catalog import dropped_losses
    from ds_local.engine.causal_lm import causal_lm
    from ds_local.engine.engine import LocalPipelineEngine
    from ds_local.engine.initialize import initialize
    from ds_local.engine.module import LocalPipelineModule
    from ds_local.errors import ConfigError, DsLocalError
    from ds_local.schedules.list_scheduler import make_schedule
    from ds_local.schedules.routes import make_routes
    from ds_local.schedules.simulator import Costs, simulate
    from ds_local.training.callbacks import Callback, Run, Validation

__all__ = [
    "LocalPipelineModule",
    "causal_lm",
    "initialize",
    "LocalPipelineEngine",
    "train",
    "Callback",
    "Run",
    "Validation",
    "DsLocalError",
    "ConfigError",
    "dropped_losses",
    "make_routes",
    "make_schedule",
    "simulate",
    "Costs",
]

_HOME = {
    "LocalPipelineModule": "engine.module",
    "causal_lm": "engine.causal_lm",
    "initialize": "engine.initialize",
    "LocalPipelineEngine": "engine.engine",
    "train": "cli.train",
    "Callback": "training.callbacks",
    "Run": "training.callbacks",
    "Validation": "training.callbacks",
    "DsLocalError": "errors",
    "ConfigError": "errors",
    "dropped_losses": "config.catalog",
    "make_routes": "schedules.routes",
    "make_schedule": "schedules.list_scheduler",
    "simulate": "schedules.simulator",
    "Costs": "schedules.simulator",
}


def __getattr__(name: str) -> Any:
    """Import on first use: looking at schedules must not take the seconds that DeepSpeed takes."""
    if name not in _HOME:
        raise AttributeError(f"module 'ds_local' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ds_local.{_HOME[name]}"), name)


if sys.modules.get("deepspeed"):  # a script that starts the processes itself: see the seam
    import ds_local.engine.deepspeed_seam  # noqa: F401
