"""ds_local: train each pipeline stage on its own language-model loss, under DeepSpeed, without a pipeline bubble.

Reading order
    routes       which loss trains which segment; every scheme is one table
    schedule     the compute order of each stage as data; `order` makes it, `peers` holds other pipelines' for comparison
    simulator    what a schedule costs
    config       the "local_parallel" section of ds_config.json;  deepspeed_config: the rest of the file;
                 lr_schedule: learning-rate schedules that it can name
    corpus, data text -> tokens -> sequences -> micro-batches
    blocks       a Hugging Face model as pipeline layers;  heads: a loss for an early segment
    flops        what a segment's work costs;  partition: where to cut;
    pricing      what a layout of a cluster costs;  planner: which one is fastest
    transport    links between stages;  tensors: what they carry;  codecs: how small;  staging: between host and device;
                 notices: words off the step path
    surroundings what a rank sees alone;  cluster: is everybody here, and the same?
    copies       weights of other segments in auxiliary heads
    replicas     replicas that train apart and meet now and then;  subnets: each on a share of the weights
    pretrained   weights of a Hugging Face model, each rank its own
    module       layers cut into segments;  seeds: random numbers by purpose
    engine       runs it all under DeepSpeed;  start: makes one;  instructions, replacements: its DeepSpeed side
    metrics, watchdog, diagnostics, checkpoint, train
    hf           checkpoint -> Hugging Face folder;  card: its README

Words
    segment: unit trained by one row of the table; K of them · stage: pipeline rank, holds `segments_per_stage` segments ·
    replica: data-parallel copy of a stage · micro-batch · step: one optimizer step · tick: column of a schedule grid ·
    action: ours, becomes a DeepSpeed instruction · head: auxiliary head · readout: hidden -> vocabulary matrix ·
    window: N or k of a row · chunk: segments sharing a loss · block: one decoder layer.
    Sizes: B sequences, T tokens, D hidden, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_local.config import ConfigError
    from ds_local.engine import LocalPipelineEngine
    from ds_local.module import LocalPipelineModule, causal_lm
    from ds_local.order import make_schedule
    from ds_local.routes import make_routes
    from ds_local.simulator import Costs, simulate
    from ds_local.start import initialize

__all__ = [
    "LocalPipelineModule",
    "causal_lm",
    "initialize",
    "LocalPipelineEngine",
    "ConfigError",
    "make_routes",
    "make_schedule",
    "simulate",
    "Costs",
]

_HOME = {
    "LocalPipelineModule": "module",
    "causal_lm": "module",
    "initialize": "start",
    "LocalPipelineEngine": "engine",
    "ConfigError": "config",
    "make_routes": "routes",
    "make_schedule": "order",
    "simulate": "simulator",
    "Costs": "simulator",
}


def __getattr__(name: str) -> Any:
    """Import on first use: looking at schedules must not take the seconds that DeepSpeed takes."""
    if name not in _HOME:
        raise AttributeError(f"module 'ds_local' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ds_local.{_HOME[name]}"), name)
