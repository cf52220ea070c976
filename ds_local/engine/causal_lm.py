"""A Hugging Face causal language model as a pipeline module."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.pipe import LayerSpec
from deepspeed.utils import log_dist
from torch import Tensor

from ds_local.config.deepspeed import batch_sizes, check_number
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.engine.batches import TokenBatches
from ds_local.engine.deepspeed_checks import checked
from ds_local.engine.module import LocalPipelineModule
from ds_local.engine.module_checks import stages_of, world_size
from ds_local.errors import ConfigError, UnsupportedModel
from ds_local.links.agreement import gather
from ds_local.model import blocks, families, heads
from ds_local.model.exported_heads import load_head
from ds_local.model.flops import choose_parts
from ds_local.model.frequent import checked_counts
from ds_local.model.pretrained import Weights, find_weights, load_layer
from ds_local.model.routers import routers_of
from ds_local.model.small_models import prefix
from ds_local.replicas.cuts import check_cut
from ds_local.replicas.head_copies import planned_copies
from ds_local.schedules.run_plan import head_segments
from ds_local.schedules.units import Unit


def _check_widths(hf_config: Any, section: LocalParallelConfig, num_stages: int) -> None:
    """A bottleneck is narrower than the model, and a stage's weights fit the machine's memory."""
    if section.head.rank is not None and section.head.rank > hf_config.hidden_size:
        raise ConfigError(
            f"{SECTION}.head.rank is {section.head.rank}, wider than the model's hidden state of "
            f"{hf_config.hidden_size}; lower it, or leave it out"
        )
    needed = 4 * sum(p.numel() for p in families.skeleton(hf_config).parameters()) // num_stages
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"a stage's weights take {needed / 2**30:,.0f} GiB in fp32, this machine has "
            f"{memory / 2**30:,.0f} GiB; use more stages or a smaller model"
        )


def _check_depth(hf_config: Any, section: LocalParallelConfig, num_stages: int) -> None:
    """There is a block for every segment."""
    per_stage, depth = section.segments_per_stage, families.num_blocks(hf_config)
    num_segments = num_stages * per_stage
    section.check_lengths(num_segments)
    if num_segments > depth:
        raise ConfigError(
            f"{num_stages} stages x {per_stage} segments need at least {num_segments} blocks, the "
            f"model has {depth}; lower num_stages or segments_per_stage, or use a deeper model"
        )


def _check_exits(hf_config: Any, section: LocalParallelConfig, parts: Sequence[int]) -> None:
    """The blocks up to every loss are a model of the family, as which they are exported."""
    for segment in sorted(head_segments(section, len(parts) - 1) - {len(parts) - 2}):
        depth = parts[segment + 1] - 1 + blocks.head_blocks(hf_config, segment, section.head, parts)
        try:
            prefix(hf_config, depth)
        except UnsupportedModel as error:
            raise ConfigError(
                f"segment {segment} ends after block {depth}, where no {hf_config.model_type} can "
                f"end: {error}; set {SECTION}.parts to cut elsewhere"
            ) from error


def _check_correction(hf_config: Any, section: LocalParallelConfig) -> None:
    """A control variate weighs losses segment by segment; the router loss that one loss has is
    shared by segments."""
    routers = routers_of(hf_config)
    if routers is None or not routers.coefficient:
        return
    for _, scheme in section.schemes():
        if scheme.correction:
            raise ConfigError(
                f"{SECTION}.correction is {scheme.correction}, which cannot make up for the router "
                f"loss of {hf_config.model_type}'s experts; leave it out, or set the model's "
                "router_aux_loss_coef to 0"
            )


def _sequence_length(hf_config: Any, seq_len: int | None) -> int:
    """Tokens in a sequence: as given, or as many as the model takes."""
    longest = families.num_positions(hf_config)
    if seq_len is None:
        return longest
    check_number("seq_len", seq_len)
    if seq_len > longest:
        raise ConfigError(
            f"sequences have {seq_len} tokens but the model takes at most {longest}; prepare data "
            f"with --seq-len {longest}"
        )
    return seq_len


def _counts(
    hf_config: Any, section: LocalParallelConfig, num_segments: int, given: Any
) -> Tensor | None:
    """How often each token comes, if heads have the frequent part of the vocabulary alone."""
    size = section.head.vocabulary
    if size is None or not head_segments(section, num_segments):
        return None
    if size >= hf_config.vocab_size:
        raise ConfigError(
            f"{SECTION}.head.vocabulary is {size}, and the model's vocabulary has no more than "
            f"{hf_config.vocab_size} tokens; lower it, or leave it out"
        )
    others, samples = hf_config.vocab_size - size, section.head.rare_samples
    if samples is not None and samples > others:
        raise ConfigError(
            f"{SECTION}.head.rare_samples is {samples}, and there are {others} tokens beside the "
            f"{size} of head.vocabulary; lower one of the two, or leave both out"
        )
    if given is None:
        raise ConfigError(
            f"{SECTION}.head.vocabulary is {size}, the tokens that come most often, and nothing "
            "says which these are; pass causal_lm token_counts=..., a folder of "
            "scripts/prepare_data.py or a number for each token id, or leave it out"
        )
    if isinstance(given, str | Path):
        from ds_local.data.token_counts import token_counts_of  # training without data needs none

        given = token_counts_of(given)
    return checked_counts(given, hf_config.vocab_size)


def _check_agreed(counts_V: Tensor | None) -> None:
    """Columns of a readout mean the same tokens on all replicas. A collective call where there are
    counts."""
    if counts_V is None:
        return
    told = gather(hashlib.sha256(counts_V.numpy().tobytes()).hexdigest())
    others = [rank for rank, other in enumerate(told) if other != told[0]]
    if others:
        raise ConfigError(
            f"token_counts on rank {others[0]} are not those on rank 0; give all ranks the same"
        )


def causal_lm(
    model: Any,
    num_stages: int | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    seq_len: int | None = None,
    activation_checkpoint_interval: int = 0,
    topology: Any = None,
    weights: str | Path | None = None,
    from_scratch: bool = False,
    token_counts: Any = None,
    unit: Unit | None = None,
) -> LocalPipelineModule:
    """A Hugging Face causal language model, ready to train: embedding, blocks, readout, and an
    auxiliary head per segment.

    Args:
        model: a config.json in Hugging Face's form, a model folder or name, a dict or a
            `PretrainedConfig`.
        weights: folder of safetensors to start from; default `model`, where that is a folder or
            name that has some.
        from_scratch: start from fresh weights whatever there is.
        num_stages, config, activation_checkpoint_interval, topology, unit: as for
            `LocalPipelineModule`.
        seq_len: tokens in a sequence, for balancing the segments; default the model's longest.
        token_counts: how often each token comes in the training data, for `head.vocabulary`: a
            folder of scripts/prepare_data.py, or a number for each token id, the same on all ranks.

    Raises:
        UnsupportedModel: for a model that cannot be cut into layers; docs/models.md lists those
            that can.
        ConfigError: when the configuration contradicts the model or the number of processes.
        WeightsError: when the pretrained weights are damaged or of another model.
    """
    ds_config, section = checked(config or {})
    hf_config = families.load_model_config(model)
    if weights is None and not from_scratch and isinstance(model, str | Path):
        weights = find_weights(model)
    pretrained = None if weights is None or from_scratch else Weights(weights, hf_config)
    stages = unit.num_stages if unit else stages_of(section, num_stages, topology)
    seed, num_segments = section.seed, stages * section.segments_per_stage
    replicas = 1 if unit else world_size() // stages
    _check_depth(hf_config, section, stages)
    _check_widths(hf_config, section, stages)
    _check_correction(hf_config, section)
    check_cut(hf_config, section.replicas, replicas, pretrained is not None)
    length = _sequence_length(hf_config, seq_len)
    num_micro_batches = batch_sizes(ds_config, replicas)[1]
    parts = section.parts or choose_parts(
        hf_config, section, num_segments, num_micro_batches, length
    )
    _check_exits(hf_config, section, parts)
    counts_V = _counts(hf_config, section, num_segments, token_counts)
    depth = range(families.num_blocks(hf_config))
    layers = [
        LayerSpec(blocks.Embedding, hf_config, seed),
        *(LayerSpec(blocks.Block, hf_config, index, seed) for index in depth),
        LayerSpec(blocks.Readout, hf_config, seed, section.head.kernel),
    ]
    module = LocalPipelineModule(
        layers,
        stages,
        loss_fn=heads.lm_loss,
        config=config,
        parts=parts,
        head=lambda segment: blocks.make_head(
            hf_config, segment, seed, section.head, parts, counts_V
        ),
        activation_checkpoint_interval=activation_checkpoint_interval,
        topology=topology,
        unit=unit,
    )
    module.hf_config, module.routers = hf_config, routers_of(hf_config)
    module.token_batches = TokenBatches(hf_config.vocab_size, families.learned_positions(hf_config))
    module.copies = planned_copies(section, num_segments, head_segments(section, num_segments))
    _check_agreed(counts_V)
    if pretrained is not None:
        log_dist(f"starting from the weights in {pretrained.folder}", ranks=[0])
        for number, layer in zip(module.layer_numbers, module.forward_funcs, strict=True):
            load_layer(layer, number, pretrained)
        for segment, head in module.heads.items():
            load_head(head, int(segment), section.head, parts, pretrained)
    return module
