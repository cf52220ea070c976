"""`LocalPipelineModule`: a DeepSpeed `PipelineModule` whose layers are cut into segments, each with
a head of its own.

A stage holds one or more segments. What a segment does (run its layers, compute its loss) is here;
in which order stages do it is in `schedule.py`, what travels between them in `messages.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn

from ds_local.cluster.surroundings import complete_environment
from ds_local.config.strict import SECTION
from ds_local.engine.batches import TokenBatches, split_batch
from ds_local.engine.deepspeed_checks import checked
from ds_local.engine.foreign_weights import ForeignWeights, check_untied
from ds_local.engine.layer_runs import run_layers
from ds_local.engine.module_checks import (
    check_arguments,
    check_batches,
    check_layers,
    stages_of,
    world_size,
)
from ds_local.engine.module_files import ModuleFiles
from ds_local.engine.process_group import start_processes
from ds_local.errors import ConfigError
from ds_local.links.agreement import together
from ds_local.links.failures import meeting
from ds_local.links.store_guard import store_guard
from ds_local.model import blocks, compiling, heads
from ds_local.model.cut import balance
from ds_local.model.routers import Routers, share_of, without_logits
from ds_local.model.split_linear import make_splittable
from ds_local.model.state import hidden_of
from ds_local.replicas.head_copies import Copy
from ds_local.schedules.routes import Routes
from ds_local.schedules.run_plan import head_segments, stages_of_segments
from ds_local.schedules.units import Unit

MakeHead = Callable[[int], nn.Module]


class LocalPipelineModule(ModuleFiles):
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
        dynamic_shape: as for `PipelineModule`, for scripts that pass it; here shapes may always
            change from message to message.
        unit: the part of the pipeline that this job is; None: all of it.

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
        dynamic_shape: bool = False,
        unit: Unit | None = None,
    ) -> None:
        layers = list(layers)
        ds_config, self.section = checked(config or {})
        stages = unit.num_stages if unit else stages_of(self.section, num_stages, topology)
        check_arguments(loss_fn, head, activation_checkpoint_interval)
        check_batches(ds_config, self.section, stages, 1 if unit else world_size() // stages)
        self.unit, self.pipeline_stages = unit, stages
        # of a Hugging Face model; set by `causal_lm`, as are its batches and copies
        self.hf_config: Any = None
        self.token_batches: TokenBatches | None = None
        self.routers: Routers | None = None
        self.router_loss: Tensor | None = None  # of the segment that ran last
        self.shallow: Tensor | None = None  # of the same: what its head's companion foresees
        self.copies: list[Copy] = []
        self.on_load: list[Callable[[], None]] = []  # called when weights have been loaded
        self._given_parts = self.section.parts or parts
        self._make_head = head
        check_layers(layers, stages, self.section, self._given_parts, head is not None)
        if self.section.loss_weighting == "token" and loss_fn is not heads.lm_loss:
            raise ConfigError(
                f'{SECTION}.loss_weighting is "token", but only the loss of language models counts '
                "tokens; leave it out, or pass loss_fn=ds_local.model.heads.lm_loss"
            )
        complete_environment()
        limits = self.section.layout.start_timeout_seconds, self.section.link.wait_seconds
        start_processes(limits[0], max(limits))  # reading a model takes some ranks longer
        if unit is None and topology is None and self.section.layout.stages == "within_node":
            topology = ProcessTopology(
                axes=["data", "pipe"], dims=[dist.get_world_size() // stages, stages]
            )
        what = "the making of the model"
        with meeting(what), store_guard(what, max(limits)):
            super().__init__(
                layers=layers,
                num_stages=len(unit.stages) if unit else stages,
                topology=topology,
                loss_fn=loss_fn,
                partition_method="parameters",
                activation_checkpoint_interval=activation_checkpoint_interval,
                dynamic_shape=dynamic_shape,
            )
            own = dict(zip(self.layer_numbers, self.forward_funcs, strict=True))
            together(lambda: check_untied(layers, own, dict(self.heads.items())))
        del self._make_head
        self._foreign = ForeignWeights(self)
        self.register_load_state_dict_post_hook(self._loaded)

    # --- building ---------------------------------------------------------------------------------

    def runs(self) -> list[range]:
        per_stage = self.section.segments_per_stage
        self.num_segments = self.pipeline_stages * per_stage
        if self._given_parts is not None:
            self.segment_parts = list(self._given_parts)
        else:
            self.segment_parts = balance(
                [count + 1 for count in self.count_layer_parameters()], [0.0] * self.num_segments
            )
        self.stage_of = stages_of_segments(self.section, self.pipeline_stages)
        first = self.unit.stages.start if self.unit else 0
        self.stages_here = range(first, first + self.num_stages)
        self.stage = first + self.stage_id
        self.local_segments = self.segments_of([self.stage])
        return [self._layers_in(segment) for segment in self.local_segments]

    def segments_of(self, stages: Container[int]) -> list[int]:
        return [segment for segment, stage in enumerate(self.stage_of) if stage in stages]

    def _layers_in(self, segment: int) -> range:
        """Their numbers in the whole model."""
        return range(*self.segment_parts[segment : segment + 2])

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
        compiling.allow_kinds()
        super().compile(*args, **kwargs)
        for head in self.heads.values():
            head.compile(*args, **kwargs)

    # --- running ----------------------------------------------------------------------------------

    def layers_of(self, segment: int) -> list[Callable[[Any], Any]]:
        first = self.layer_numbers.index(self.segment_parts[segment])
        return self.forward_funcs[first : first + len(self._layers_in(segment))]

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, labels) of a micro-batch. Raises DataError when it cannot be used."""
        return self.token_batches.split(batch) if self.token_batches else split_batch(batch)

    def name_of_output(self, segment: int) -> str:
        """The layer whose output is the segment's."""
        number = self.segment_parts[segment + 1] - 1 - self._computes_own_loss(segment)
        layer = self.forward_funcs[self.layer_numbers.index(number)]
        return f"layer {number} ({getattr(layer, '__name__', type(layer).__name__)})"

    def run_segment(self, segment: int, inputs: Any) -> Any:
        """The segment's layers; of the last segment all but a readout that computes its own
        loss. The loss of their routers, if they have some, is then in `router_loss`, and what a
        companion foresees in `shallow`."""
        layers = self.layers_of(segment)
        if self._computes_own_loss(segment):
            layers = layers[:-1]
        self.shallow = None
        if self.training and self._foresees(segment):
            if segment == 0:  # the embedding, which is not computed again
                inputs, layers = layers[0](inputs), layers[1:]
            self.shallow = hidden_of(inputs).detach().clone()
        outputs = run_layers(layers, inputs, self.activation_checkpoint_interval)
        self._foreign.look("the layers", segment, outputs)
        outputs, self.router_loss = without_logits(outputs, self.routers)
        return outputs

    def loss_of(
        self, segment: int, hidden: Any, labels: Any, shallow: Tensor | None = None
    ) -> Tensor:
        """The segment's loss (scalar): its auxiliary head's, or the model's own for the last
        segment. To train it takes what `run_segment` left in `shallow`."""
        if self.token_batches:
            labels = labels.long()
        loss = self._loss_of(segment, hidden, labels, shallow)
        self._foreign.look("the loss", segment, loss)
        return loss

    def _loss_of(self, segment: int, hidden: Any, labels: Any, shallow: Tensor | None) -> Tensor:
        if segment < self.num_segments - 1:
            beside = () if shallow is None else (shallow,)
            return self.heads[str(segment)](hidden, labels, *beside)
        if self._computes_own_loss(segment):
            return self.forward_funcs[-1].loss(hidden, labels)
        return hidden if self.loss_fn is None else self.loss_fn(hidden, labels)

    def _foresees(self, segment: int) -> bool:
        """Has the segment's head a companion?"""
        if str(segment) not in self.heads:
            return False
        head = self.heads[str(segment)]
        return isinstance(head, heads.AuxiliaryHead) and head.companion is not None

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
            return list(self.forward_funcs[-1].readout.parameters())
        private = [
            layer for layer in self.layers_of(copy.source) if isinstance(layer, blocks.Block)
        ]
        count = blocks.head_blocks(
            self.hf_config, copy.target, self.section.head, self.segment_parts
        )
        return [p for block in private[:count] for p in block.parameters()]

    def router_factor(self, routes: Routes, segment: int, which: int) -> float:
        """What the segment's router loss counts for in one of its passes."""
        if self.routers is None:
            return 0.0
        return self.routers.coefficient * share_of(routes, segment, which, self.segment_parts)

    def layer_parameters(self, segment: int) -> Iterator[nn.Parameter]:
        """Parameters of the segment's layers that take gradients, each once."""
        layers = (layer for layer in self.layers_of(segment) if isinstance(layer, nn.Module))
        found = {id(p): p for layer in layers for p in layer.parameters() if p.requires_grad}
        yield from found.values()

    def segment_parameters(self, segment: int) -> Iterator[nn.Parameter]:
        """Parameters of the segment's layers and head that take gradients, each once; one that
        segments of this stage share is the lowest one's."""
        lower = [s for s in self.local_segments if s < segment]
        taken = {id(p) for one in lower for p in self._used_in(one)}
        yield from (p for p in self._used_in(segment) if id(p) not in taken)

    def _used_in(self, segment: int) -> Iterable[nn.Parameter]:
        head = self.heads[str(segment)].parameters() if str(segment) in self.heads else ()
        found = [*self.layer_parameters(segment), *(p for p in head if p.requires_grad)]
        return {id(p): p for p in found}.values()
