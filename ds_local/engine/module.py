"""`LocalPipelineModule`: a DeepSpeed `PipelineModule` whose layers are cut into segments, each with
a head of its own.

A stage holds one or more consecutive segments. What a segment does (run its layers, compute its
loss) is here; in which order stages do it is `schedule.py`, what travels between them is
`transport.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from deepspeed.utils import log_dist, logger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_local.checkpoints.facts import FACTS, head_options, read_facts
from ds_local.checkpoints.folder import HEAD_FILE
from ds_local.checkpoints.tensors import check_tensors
from ds_local.cluster.surroundings import complete_environment
from ds_local.config.deepspeed import batch_sizes, check_number
from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.engine.batches import TokenBatches, split_batch
from ds_local.engine.deepspeed_checks import checked
from ds_local.engine.deepspeed_seam import PipelineModuleSeam
from ds_local.engine.process_group import start_processes
from ds_local.engine.safe_files import SafeCheckpointEngine
from ds_local.errors import CheckpointError, ConfigError
from ds_local.links.failures import meeting
from ds_local.links.trees import map_tensors
from ds_local.model import blocks, heads
from ds_local.model.cut import balance
from ds_local.model.exported_heads import load_head
from ds_local.model.flops import choose_parts
from ds_local.model.pretrained import Weights, find_weights, load_layer
from ds_local.model.split_linear import make_splittable
from ds_local.replicas.cuts import check_cut
from ds_local.replicas.head_copies import Copy, planned_copies
from ds_local.schedules.run_plan import RunPlan, head_segments

MakeHead = Callable[[int], nn.Module]


class LocalPipelineModule(PipelineModuleSeam):
    """Layers, cut into segments and dealt to pipeline stages.

    Args:
        layers: as for `PipelineModule`: modules, `LayerSpec`s or functions, each taking what the
            one before returns.
        num_stages: pipeline stages; default `local_parallel.num_stages`, or one stage per process.
        loss_fn: `loss_fn(outputs of the last layer, labels) -> scalar`, the model's own loss.
        head: `head(segment_id) -> nn.Module`, called as `module(hidden, labels) -> scalar`; makes
            the auxiliary head of each segment that the routes give a loss, except the last, which
            has the model's own.
        config: the DeepSpeed config (path or dict) with its "local_parallel" section.
        parts: layer boundaries of the segments, from 0 to the number of layers; default
            `local_parallel.parts`, or balanced by trainable parameters.
        activation_checkpoint_interval: recompute every so many layers in the backward pass
            (non-reentrant); 0 is off.
        topology: as for `PipelineModule`; its axes must be pipe and data.

    Raises:
        ConfigError: when the configuration contradicts itself, the model or the number of
            processes. Nothing has been started by then.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        num_stages: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        head: MakeHead | None = None,
        config: str | Path | Mapping[str, Any] | None = None,
        parts: Sequence[int] | None = None,
        activation_checkpoint_interval: int = 0,
        topology: Any = None,
    ) -> None:
        layers = list(layers)
        ds_config, self.section = checked(config or {})
        stages = _num_stages(self.section, num_stages, topology)
        _check_arguments(loss_fn, head, activation_checkpoint_interval)
        _check_batches(ds_config, self.section, stages)
        self.hf_config: Any = (
            None  # of a Hugging Face model; set by `causal_lm`, as are its batches and copies
        )
        self.token_batches: TokenBatches | None = None
        self.copies: list[Copy] = []
        self.on_load: list[Callable[[], None]] = []  # called when weights have been loaded
        self._given_parts = self.section.parts or parts
        self._make_head = head
        self._check_layers(layers, stages)
        if self.section.loss_weighting == "token" and loss_fn is not heads.lm_loss:
            raise ConfigError(
                f'{SECTION}.loss_weighting is "token", but only the loss of language models counts '
                "tokens; leave it out, or pass loss_fn=ds_local.model.heads.lm_loss"
            )
        complete_environment()
        limits = self.section.layout.start_timeout_seconds, self.section.link.timeout_seconds
        start_processes(limits[0], max(limits))  # reading a model takes some ranks longer
        if topology is None and self.section.layout.stages == "within_node":
            topology = ProcessTopology(
                axes=["data", "pipe"], dims=[dist.get_world_size() // stages, stages]
            )
        with meeting("the making of the model"):
            super().__init__(
                layers=layers,
                num_stages=stages,
                topology=topology,
                loss_fn=loss_fn,
                partition_method="parameters",
                activation_checkpoint_interval=activation_checkpoint_interval,
            )
        del self._make_head
        self.register_load_state_dict_post_hook(self._loaded)

    def _check_layers(self, layers: list[Any], num_stages: int) -> None:
        num_segments = num_stages * self.section.segments_per_stage
        self.section.check_lengths(num_segments)
        if num_segments > len(layers):
            raise ConfigError(
                f"{num_stages} stages x {self.section.segments_per_stage} segments need at least "
                f"{num_segments} layers, the model has {len(layers)}; lower num_stages or "
                "segments_per_stage"
            )
        if num_stages > 1 and (tied := _tied(layers)):
            raise ConfigError(
                f"{tied}: weights that stages share need a collective over all stages in every "
                "step; use separate layers (untied)"
            )
        if not any(getattr(layer, "typename", None) is blocks.Block for layer in layers):
            check_cut(None, self.section.replicas, 1)
        parts = self._given_parts
        if parts is not None:
            rising = all(a < b for a, b in pairwise(parts))
            if (
                len(parts) != num_segments + 1
                or parts[0] != 0
                or parts[-1] != len(layers)
                or not rising
            ):
                raise ConfigError(
                    f"local_parallel.parts is {list(parts)}; it needs {num_segments + 1} "
                    f"increasing numbers from 0 to the number of layers, {len(layers)}"
                )
        if (
            head_segments(self.section, num_segments) and self._make_head is None
        ):  # also refuses routes that do not fit
            raise ConfigError(
                "the routes give segments before the last a loss; pass head=make_head to "
                "LocalPipelineModule"
            )

    # --- building ---------------------------------------------------------------------------------

    def bounds(self) -> tuple[int, int]:
        per_stage = self.section.segments_per_stage
        self.num_segments = self.num_stages * per_stage
        if self._given_parts is not None:
            self.segment_parts = list(self._given_parts)
        else:
            self.segment_parts = balance(
                [count + 1 for count in self.count_layer_parameters()], [0.0] * self.num_segments
            )
        self.parts = self.segment_parts[::per_stage]
        self.local_segments = range(self.stage_id * per_stage, (self.stage_id + 1) * per_stage)
        return self.parts[self.stage_id], self.parts[self.stage_id + 1]

    def built(self) -> None:
        if self.section.split_backward:
            make_splittable(self)
        self.heads = nn.ModuleDict()
        if self._make_head is not None:
            for segment in sorted(
                set(self.local_segments) & head_segments(self.section, self.num_segments)
            ):
                self.heads[str(segment)] = self._make_head(segment)
        for parameter in self.heads.parameters():
            setattr(parameter, "ds_pipe_replicated", False)  # noqa: B010 - DeepSpeed counts what is marked in its norms

    def mpu(self) -> Any:
        """Asked for by `deepspeed.initialize`, which would train this module by 1F1B.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "deepspeed.initialize would ignore the scheme of this model and train it by 1F1B; call "
            "ds_local.initialize, with the same arguments"
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` every layer, as `PipelineModule` does, and every head. Arguments are
        those of `torch.compile`.

        Raises:
            ConfigError: with split_backward, which takes apart what this makes one.
        """
        if self.section.split_backward:
            raise ConfigError(
                "engine.compile() makes one piece of what local_parallel.split_backward takes "
                "apart; leave one out"
            )
        super().compile(*args, **kwargs)
        for head in self.heads.values():
            head.compile(*args, **kwargs)

    # --- checkpoints: heads have files of their own, so that the layer files fit a stock
    # PipelineModule ---------------------

    def save_state_dict(
        self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False
    ) -> None:
        super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        if self.grid.data_parallel_id == 0:
            for segment, head in self.heads.items():
                state = clone_tensors_for_torch_save(head.state_dict())
                checkpoint_engine.save(
                    state_dict=state, path=os.path.join(save_dir, HEAD_FILE.format(int(segment)))
                )

    def load_state_dir(
        self, load_dir: str, checkpoint_engine: Any = None, strict: bool = True
    ) -> None:
        """Load the weights of this stage from layer files, and of the heads whose segments end at a
        layer where the checkpoint has one. Files of a stock `PipelineModule` will do.

        Raises:
            CheckpointError: when they are not of this model. Nothing has been changed by then.
        """
        engine = checkpoint_engine or SafeCheckpointEngine()
        heads = self.check_state_dir(load_dir, engine, strict)
        super().load_state_dir(load_dir, engine, strict)
        for segment, head in self.heads.items():
            path = heads[segment]
            if path is not None:
                head.load_state_dict(engine.load(path, map_location="cpu"), strict=strict)
            elif self.grid.data_parallel_id == 0:
                layer = self.segment_parts[int(segment) + 1]
                logger.warning(
                    f"{load_dir} has no head that fits after {layer} layers: that of segment "
                    f"{segment} starts afresh"
                )
        self._loaded()

    def _loaded(self, *_: Any) -> None:
        for follow in self.on_load:
            follow()

    def check_state_dir(
        self,
        load_dir: str,
        checkpoint_engine: Any,
        strict: bool = True,
        shape_of: Callable[[Tensor], torch.Size] = lambda tensor: tensor.shape,
    ) -> dict[str, str | None]:
        """Compare what `load_state_dir` would load with what there is, by names and shapes.

        Args:
            shape_of: the shape in a checkpoint of one of this stage's tensors.

        Returns:
            The file of each head, None where no head of the checkpoint fits.

        Raises:
            CheckpointError: naming the file and the tensors that do not fit.
        """
        for index, layer in enumerate(self.forward_funcs):
            if isinstance(layer, nn.Module):
                paths = self.ckpt_layer_path_list(load_dir, index)
                if not paths:
                    name = os.path.basename(self.ckpt_layer_path(load_dir, index))
                    raise CheckpointError(
                        f"{load_dir} has no {name}; give a checkpoint of the same model"
                    )
                if len(paths) == 1:  # several: slices for tensor parallelism, which DeepSpeed joins
                    found = checkpoint_engine.look(paths[0])
                    check_tensors(found, layer, paths[0], strict, shape_of)
        return {
            segment: self._head_file(int(segment), head, load_dir, checkpoint_engine, shape_of)
            for segment, head in self.heads.items()
        }

    def _head_file(
        self,
        segment: int,
        head: nn.Module,
        load_dir: str,
        checkpoint_engine: Any,
        shape_of: Callable[[Tensor], torch.Size],
    ) -> str | None:
        """Of the head that a checkpoint has where this segment ends, if it is of the same kind."""
        if not os.path.exists(os.path.join(load_dir, FACTS)):
            return None
        facts = read_facts(load_dir)
        segments = {end: number for number, end in enumerate(facts["segment_parts"][1:])}
        name = HEAD_FILE.format(segments.get(self.segment_parts[segment + 1], -1))
        if name not in facts["files"]:
            return None
        path = os.path.join(load_dir, name)
        try:
            check_tensors(checkpoint_engine.look(path), head, path, shape_of=shape_of)
        except CheckpointError:
            if head_options(facts) != head_options({SECTION: self.section.model_dump(mode="json")}):
                return None
            raise
        return path

    # --- running ----------------------------------------------------------------------------------

    def layers_of(self, segment: int) -> list[Callable[[Any], Any]]:
        start, stop = (
            self.segment_parts[segment] - self.first_layer,
            self.segment_parts[segment + 1] - self.first_layer,
        )
        return self.forward_funcs[start:stop]

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, labels) of a micro-batch. Raises DataError when it cannot be used."""
        return self.token_batches.split(batch) if self.token_batches else split_batch(batch)

    def name_of_output(self, segment: int) -> str:
        """The layer whose output is the segment's."""
        number = self.segment_parts[segment + 1] - 1 - self._computes_own_loss(segment)
        layer = self.forward_funcs[number - self.first_layer]
        return f"layer {number} ({getattr(layer, '__name__', type(layer).__name__)})"

    def run_segment(self, segment: int, inputs: Any) -> Any:
        """The segment's layers; of the last segment all but a readout that computes its own
        loss."""
        layers = self.layers_of(segment)
        if self._computes_own_loss(segment):
            layers = layers[:-1]
        interval = self.activation_checkpoint_interval or max(1, len(layers))
        for start in range(0, len(layers), interval):
            part = layers[start : start + interval]
            if self.activation_checkpoint_interval and torch.is_grad_enabled():
                inputs = checkpoint(_apply_to_copy, part, inputs, use_reentrant=False)
            else:
                inputs = _apply(part, inputs)
        return inputs

    def loss_of(self, segment: int, hidden: Any, labels: Any) -> Tensor:
        """The segment's loss (scalar): its auxiliary head's, or the model's own for the last
        segment."""
        if self.token_batches:
            labels = labels.long()
        if segment < self.num_segments - 1:
            return self.heads[str(segment)](hidden, labels)
        if self._computes_own_loss(segment):
            return self.forward_funcs[-1].loss(hidden, labels)
        return hidden if self.loss_fn is None else self.loss_fn(hidden, labels)

    def _computes_own_loss(self, segment: int) -> bool:
        """Does the last layer compute the model's loss itself, so that the logits need not be
        kept?"""
        last = segment == self.num_segments - 1
        return (
            last
            and self.loss_fn is heads.lm_loss
            and isinstance(self.forward_funcs[-1], blocks.Readout)
        )

    def logits_of(self, outputs: Any) -> Any:
        """What the last layer gives, from the outputs of the last segment."""
        return (
            self.forward_funcs[-1](outputs)
            if self._computes_own_loss(self.num_segments - 1)
            else outputs
        )

    def has_loss(self, segment: int) -> bool:
        return segment == self.num_segments - 1 or str(segment) in self.heads

    def weight_of(self, labels: Any) -> float | Tensor:
        """Weight of a micro-batch in an average of losses: its predicted positions in a language
        model, else 1."""
        return heads.count_targets(labels) if self.loss_fn is heads.lm_loss else 1.0

    def head_parameters(self, segment: int) -> list[nn.Parameter]:
        """Parameters that only the segment's loss sees: its auxiliary head's, or those of a readout
        that computes the loss."""
        if str(segment) in self.heads:
            return [p for p in self.heads[str(segment)].parameters() if p.requires_grad]
        return list(self.forward_funcs[-1].parameters()) if self._computes_own_loss(segment) else []

    def copied_tensors(self, copy: Copy, end: str) -> list[Tensor]:
        """The weights of a copy at its "source" or "target", in the same order."""
        if end == "target":
            head: Any = self.heads[str(copy.target)]
            return list((head.readout if copy.kind == "readout" else head.blocks).parameters())
        if copy.kind == "readout":
            return [self.forward_funcs[-1].readout.weight]
        private = [
            layer for layer in self.layers_of(copy.source) if isinstance(layer, blocks.Block)
        ]
        count = blocks.head_blocks(
            self.hf_config, copy.target, self.section.head, self.segment_parts
        )
        return [p for block in private[:count] for p in block.parameters()]

    def layer_parameters(self, segment: int) -> Iterator[nn.Parameter]:
        """Parameters of the segment's layers that take gradients."""
        for layer in self.layers_of(segment):
            if isinstance(layer, nn.Module):
                yield from (p for p in layer.parameters() if p.requires_grad)

    def segment_parameters(self, segment: int) -> Iterator[nn.Parameter]:
        """Parameters of the segment's layers and head that take gradients."""
        yield from self.layer_parameters(segment)
        if str(segment) in self.heads:
            yield from (p for p in self.heads[str(segment)].parameters() if p.requires_grad)


def _check_arguments(loss_fn: Any, head: Any, activation_checkpoint_interval: Any) -> None:
    for name, value in (("loss_fn", loss_fn), ("head", head)):
        if value is not None and not callable(value):
            raise ConfigError(f"{name} is a {type(value).__name__}; pass a function")
    check_number("activation_checkpoint_interval", activation_checkpoint_interval, least=0)


def _check_batches(
    ds_config: Mapping[str, Any], section: LocalParallelConfig, num_stages: int
) -> None:
    """The steps' schedules can be made, where the config says how large a step is."""
    if {"train_batch_size", "train_micro_batch_size_per_gpu"} & ds_config.keys():
        _, num_micro_batches = batch_sizes(ds_config, _world_size() // num_stages)
        _ = RunPlan.of(section, num_stages, num_micro_batches).schedules


def _tied(layers: Sequence[Any]) -> str | None:
    """Which layers share weights, if any do."""
    owner: dict[nn.Parameter, int] = {}
    for number, layer in enumerate(layers):
        if isinstance(layer, TiedLayerSpec):
            return f"layer {number} is a TiedLayerSpec"
        for parameter in layer.parameters() if isinstance(layer, nn.Module) else ():
            if owner.setdefault(parameter, number) != number:
                return f"layers {owner[parameter]} and {number} share weights"
    return None


def _num_stages(section: LocalParallelConfig, num_stages: int | None, topology: Any) -> int:
    """Checked against the number of processes, which the launcher has announced even before they
    have met."""
    if topology is not None:
        axes = sorted(topology.get_axis_names())
        if axes != ["data", "pipe"]:
            raise ConfigError(f"topology has the axes {axes}; make one of pipe and data")
        num_stages = topology.get_dim("pipe")
    return num_stages_and_replicas(section, _world_size(), num_stages)[0]


def _world_size() -> int:
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def _check_widths(hf_config: Any, section: LocalParallelConfig, num_stages: int) -> None:
    """A bottleneck is narrower than the model, and a stage's weights fit the machine's memory."""
    if section.head.rank is not None and section.head.rank > hf_config.hidden_size:
        raise ConfigError(
            f"{SECTION}.head.rank is {section.head.rank}, wider than the model's hidden state of "
            f"{hf_config.hidden_size}; lower it, or leave it out"
        )
    needed = 4 * sum(p.numel() for p in blocks.skeleton(hf_config).parameters()) // num_stages
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"a stage's weights take {needed / 2**30:,.0f} GiB in fp32, this machine has "
            f"{memory / 2**30:,.0f} GiB; use more stages or a smaller model"
        )


def _apply(layers: Sequence[Callable[[Any], Any]], inputs: Any) -> Any:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def _apply_to_copy(layers: Sequence[Callable[[Any], Any]], inputs: Any) -> Any:
    """For a layer that changes its input in place: recomputing must start from what it was."""
    return _apply(layers, map_tensors(inputs, Tensor.clone))


def causal_lm(
    model: Any,
    num_stages: int | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    seq_len: int | None = None,
    activation_checkpoint_interval: int = 0,
    topology: Any = None,
    weights: str | Path | None = None,
    from_scratch: bool = False,
) -> LocalPipelineModule:
    """A Hugging Face causal language model, ready to train: embedding, blocks, readout, and an
    auxiliary head per segment.

    Args:
        model: a config.json in Hugging Face's form, a model folder or name, a dict or a
            `PretrainedConfig`.
        weights: folder of safetensors to start from; default `model`, where that is a folder or
            name that has some.
        from_scratch: start from fresh weights whatever there is.
        num_stages, config, activation_checkpoint_interval, topology: as for `LocalPipelineModule`.
        seq_len: tokens in a sequence, for balancing the segments; default the model's longest.

    Raises:
        UnsupportedModel: for a family that is not in `blocks.FAMILIES`.
        ConfigError: when the configuration contradicts the model or the number of processes.
        WeightsError: when the pretrained weights are damaged or of another model.
    """
    ds_config, section = checked(config or {})
    hf_config = blocks.load_model_config(model)
    if weights is None and not from_scratch and isinstance(model, str | Path):
        weights = find_weights(model)
    pretrained = None if weights is None or from_scratch else Weights(weights, hf_config)
    depth = blocks.num_blocks(hf_config)
    stages = _num_stages(section, num_stages, topology)
    num_segments = stages * section.segments_per_stage
    section.check_lengths(num_segments)
    if num_segments > depth:
        raise ConfigError(
            f"{stages} stages x {section.segments_per_stage} segments need at least {num_segments} "
            f"blocks, the model has {depth}; lower num_stages or use a deeper model"
        )
    _check_widths(hf_config, section, stages)
    check_cut(hf_config, section.replicas, _world_size() // stages, pretrained is not None)
    longest = blocks.num_positions(hf_config)
    if seq_len is not None:
        check_number("seq_len", seq_len)
    if seq_len is not None and seq_len > longest:
        raise ConfigError(
            f"sequences have {seq_len} tokens but the model takes at most {longest}; prepare data "
            f"with --seq-len {longest}"
        )

    seed = section.seed
    layers = [
        LayerSpec(blocks.Embedding, hf_config, seed),
        *(LayerSpec(blocks.Block, hf_config, index, seed) for index in range(depth)),
        LayerSpec(blocks.Readout, hf_config, seed, section.head.kernel),
    ]
    num_micro_batches = batch_sizes(ds_config, _world_size() // stages)[1]
    parts = section.parts or choose_parts(
        hf_config, section, num_segments, num_micro_batches, seq_len or longest
    )
    module = LocalPipelineModule(
        layers,
        stages,
        loss_fn=heads.lm_loss,
        config=config,
        parts=parts,
        head=lambda segment: blocks.make_head(hf_config, segment, seed, section.head, parts),
        activation_checkpoint_interval=activation_checkpoint_interval,
        topology=topology,
    )
    module.hf_config = hf_config
    module.token_batches = TokenBatches(hf_config.vocab_size, blocks.learned_positions(hf_config))
    module.copies = planned_copies(section, num_segments, head_segments(section, num_segments))
    if pretrained is not None:
        log_dist(f"starting from the weights in {pretrained.folder}", ranks=[0])
        for number, layer in enumerate(module.forward_funcs, module.first_layer):
            load_layer(layer, number, pretrained)
        for segment, head in module.heads.items():
            load_head(head, int(segment), section.head, parts, pretrained)
    return module
