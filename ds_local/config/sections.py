"""The objects inside the "local_parallel" section: links, placement, heads, replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ds_local.config.strict import OptionOf, Strict
from ds_local.errors import ConfigError

Seconds = Annotated[PositiveFloat, Field(le=1e7)]  # four months

CodecName = Literal["none", "bf16", "int8", "int4", "topk", "lowrank"]


class LinkConfig(Strict):
    """Messages between stages."""

    depth: Annotated[PositiveInt, Field(le=1024)] = 4
    """Messages a link holds before its sender waits; also the number of receives posted ahead."""
    warn_seconds: Seconds = 60.0
    """A longer wait is reported, with who waits for whom."""
    transfer: Annotated[NonNegativeFloat, Field(le=1e6)] = 0.0
    """Time a message takes, in forwards of a stage, that the order of work should reckon with.
    Mixes need it on slow links."""
    timeout_seconds: Seconds = 300.0
    """Longest wait for a neighbour. Must exceed the longest pause of any stage (compilation, a slow
    disk)."""
    reconnect_seconds: Annotated[NonNegativeFloat, Field(le=1e7)] = 0.0
    """Above 0 every unit, stages between which gradients cross, is a job of its own
    (`train.py --unit`) that may die and be started again alone: its neighbours wait so long for it.
    0: all stages are one job."""
    past_host: bool = False
    """Tensors on a device go to the next stage's device over NCCL, instead of through host memory
    over gloo. For stages that NVLink or InfiniBand connects; every rank needs a GPU to itself."""
    codec: CodecName | tuple[CodecName, ...] = "none"
    """How activations are compressed (see `codecs.py`); a list has one entry per segment but the
    last."""
    group_size: Annotated[
        Annotated[PositiveInt, Field(multiple_of=2, le=2**16)] | None,
        OptionOf("codec", ("int8", "int4")),
    ] = None
    """int8, int4: features of a token that share a scale. Default: all."""
    keep: Annotated[float, Field(gt=0, le=1), OptionOf("codec", ("topk",))] = 1 / 16
    """topk: share of a token's features that travel."""
    rank: Annotated[PositiveInt | None, OptionOf("codec", ("lowrank",))] = None
    """lowrank: dimensions that a micro-batch's hidden state is projected to. Default: an eighth of
    its features."""

    @property
    def wait_seconds(self) -> float:
        """Longest wait for a rank of the same job, which may be waiting for another job itself."""
        return self.timeout_seconds + self.reconnect_seconds

    def codec_above(self, segment: int) -> CodecName:
        """The codec of the link from `segment` to the next."""
        return self.codec if isinstance(self.codec, str) else self.codec[segment]


class LayoutConfig(Strict):
    """Which ranks hold which stage."""

    stages: Literal["across_nodes", "within_node"] = "across_nodes"
    """What crosses machines: the links between stages (rank = stage x replicas + replica), which
    send little and one way only under local losses, or the averages over the replicas of a stage
    (rank = replica x stages + stage)."""
    start_timeout_seconds: Seconds = 180.0
    """Longest wait for all ranks to come, at the start."""

    def rank(self, stage: int, replica: int, num_stages: int, num_replicas: int) -> int:
        return (
            stage * num_replicas + replica
            if self.stages == "across_nodes"
            else replica * num_stages + stage
        )

    def ranks(self, num_stages: int, num_replicas: int) -> list[list[int]]:
        """For each replica the global rank of each stage."""
        return [
            [self.rank(s, r, num_stages, num_replicas) for s in range(num_stages)]
            for r in range(num_replicas)
        ]

    def neighbours(self, rank: int, num_stages: int, num_replicas: int) -> list[int]:
        """The ranks that `rank` exchanges messages with: one stage up and down, and the next
        replica of its stage."""
        for replica, chain in enumerate(self.ranks(num_stages, num_replicas)):
            if rank in chain:
                stage = chain.index(rank)
                beside = self.rank(stage, (replica + 1) % num_replicas, num_stages, num_replicas)
                return [
                    *chain[max(0, stage - 1) : stage],
                    *chain[stage + 1 : stage + 2],
                    *({beside} - {rank}),
                ]
        raise ConfigError(
            f"rank {rank} is not one of {num_stages} stages x {num_replicas} replicas"
        )


class HeadConfig(Strict):
    """Auxiliary heads of `causal_lm` models: private blocks -> norm -> bottleneck -> readout ->
    loss."""

    blocks: NonNegativeInt | tuple[NonNegativeInt, ...] = 0
    """Private blocks before the norm, made of the model's own block; a list has one entry per
    segment but the last. No head gets more blocks than the model has above its segment."""
    blocks_from: Literal["new", "next", "next_tracked"] = "new"
    """Weights of the private blocks: their own, a copy of the next segment's first blocks that then
    learns by itself, or a read-only moving average of these that follows them."""
    readout: Literal["private", "shared"] = "private"
    """A readout of its own, or a read-only copy of the last segment's."""
    refresh_every: PositiveInt = 20
    """Steps between two refreshes of what is copied from other segments."""
    tracking: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old value in the moving average of tracked blocks, at each refresh."""
    init: Literal["new", "model"] = "new"
    """Start norm and readout afresh, or as the model's final norm and readout (pretrained ones
    where the model is)."""
    rank: PositiveInt | None = None
    """Width of a bottleneck before the readout. Default: none."""
    adapter: bool = False
    """A square matrix before the readout, at first the identity: it may turn what a segment has
    into what a shared readout, or one with init "model", knows how to read."""
    temperature: bool = False
    """Learn a factor on the logits."""
    token_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the positions of a micro-batch whose loss is computed in training."""
    vocabulary: PositiveInt | None = None
    """Classes of the readout: so many tokens, those that come most often in the training data, and
    one class for all the others. `scripts/train.py` counts them in its data, `causal_lm` takes
    `token_counts`. The loss is over these classes and not comparable with one over all tokens,
    unless `rare_samples` is given. Default: all tokens."""
    rare_samples: PositiveInt | None = None
    """Beside `vocabulary`: the readout has all tokens, and in training so many draws from the
    others, each as likely as it comes in the data, stand for all of these beside the token that
    comes (sampled softmax). The loss is then one over all tokens; an evaluation draws nothing."""
    companion: NonNegativeFloat = 0.0
    """Weight of a second loss, over all positions and without a vocabulary: 1 minus the cosine
    between a linear map of the head's normed hidden state and what the segment takes in at the next
    token. In training alone; the loss that is reported is without it."""
    every: PositiveInt = 1
    """Auxiliary losses are computed for one in so many micro-batches, and count that much more."""
    kernel: Literal["torch", "checkpointed", "compiled", "liger", "cce"] = "torch"
    """What computes large losses (see `heads.linear_cross_entropy`): "compiled" is several times as
    fast on a GPU and needs a C compiler; liger and cce need their packages and a GPU."""

    @model_validator(mode="after")
    def _rank_of_its_own(self) -> HeadConfig:
        if self.rank is not None and self.readout == "shared":
            raise ValueError(
                "a shared readout has the full width; leave rank out, or use a private readout"
            )
        if self.rank is not None and self.init == "model":
            raise ValueError("the model's readout has the full width; leave rank out, or init")
        if self.rank is not None and self.adapter:
            raise ValueError(
                "a bottleneck of that rank is an adapter too; leave rank out, or adapter"
            )
        return self

    @model_validator(mode="after")
    def _classes_of_its_own(self) -> HeadConfig:
        if self.vocabulary is None:
            if self.rare_samples is not None:
                raise ValueError(
                    f"rare_samples is {self.rare_samples}, and without vocabulary no token is "
                    "rare; give vocabulary too, or leave rare_samples out"
                )
        elif self.rare_samples is None:
            shared = self.readout == "shared"
            if shared or self.init == "model":
                whose = "a shared readout" if shared else "the model's readout"
                raise ValueError(
                    f"{whose} has all tokens, and vocabulary is {self.vocabulary}; leave "
                    "vocabulary out, add rare_samples, or use a readout of its own"
                )
        return self

    @model_validator(mode="after")
    def _copies_in_use(self) -> HeadConfig:
        tracks, default = self.blocks_from == "next_tracked", HeadConfig.model_fields
        if self.tracking != default["tracking"].default and not tracks:
            raise ValueError(
                f"tracking means nothing with blocks_from {self.blocks_from!r}; remove it, or set "
                "blocks_from to next_tracked"
            )
        copies = tracks or self.readout == "shared"
        if self.refresh_every != default["refresh_every"].default and not copies:
            raise ValueError(
                f"refresh_every is {self.refresh_every}, and nothing is copied time and again; "
                "remove it, or set readout to shared or blocks_from to next_tracked"
            )
        if self.blocks_from != "new" and not self.blocks:
            raise ValueError(
                f"blocks_from is {self.blocks_from!r} without private blocks; set blocks, such as "
                "to 1, or remove it"
            )
        return self

    def chosen(self) -> list[str]:
        """The options that are not as they are by default."""
        fields = HeadConfig.model_fields.items()
        return [name for name, field in fields if getattr(self, name) != field.default]

    def classes(self, vocab_size: int) -> int:
        """Columns of the readout, of a model with so many tokens."""
        if self.vocabulary is None or self.rare_samples is not None:
            return vocab_size
        return self.vocabulary + 1

    def classes_in_training(self, vocab_size: int) -> int:
        """Of these, those that a position's loss is computed with."""
        if self.vocabulary is None or self.rare_samples is None:
            return self.classes(vocab_size)
        return self.vocabulary + self.rare_samples + 1  # the token that comes

    def blocks_of(self, segment: int, blocks_above: int) -> int:
        """Private blocks in the head of `segment`."""
        asked = self.blocks if isinstance(self.blocks, int) else self.blocks[segment]
        return min(asked, blocks_above)


class ReplicasConfig(Strict):
    """How the data-parallel replicas of a stage stay one model."""

    sync: Literal["gradients", "subnets", "periodic"] = "gradients"
    """Average gradients in every step; or deal the blocks' weights out, so that each replica trains
    a part of them alone; or train full replicas apart and average their weights now and then."""
    every: Annotated[PositiveInt, OptionOf("sync", ("subnets", "periodic"))] = 15
    """Steps between two exchanges."""
    partition: Annotated[
        tuple[Literal["attention_heads", "mlp"], ...], OptionOf("sync", ("subnets",))
    ] = ("attention_heads", "mlp")
    """What subnets deal out; the rest is shared."""
    scale: Annotated[Literal["none", "train", "eval", "sqrt"], OptionOf("sync", ("subnets",))] = (
        "eval"
    )
    """Factor on the output of what is dealt out among R replicas: none; R in training; 1/R in the
    merged model; or sqrt(R) in training."""
    optimizer_state: Annotated[
        Literal["carry", "reset", "keep_second_moment"], OptionOf("sync", ("subnets",))
    ] = "carry"
    """What becomes of the optimizer's moments at an exchange of subnets: they travel with the
    weights; all are forgotten; or the second travel and the first are zeroed."""
    outer_lr: Annotated[PositiveFloat, OptionOf("sync", ("periodic",))] = 0.7
    """Learning rate of the outer Nesterov step of periodic averaging; 1 without momentum is plain
    averaging."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1), OptionOf("sync", ("periodic",))] = 0.9
    """Momentum of the outer step."""

    @model_validator(mode="after")
    def _parts_once_each(self) -> ReplicasConfig:
        if not self.partition or len(set(self.partition)) < len(self.partition):
            raise ValueError(
                "partition must name attention_heads, mlp or both, once each, got "
                f"{list(self.partition)}"
            )
        return self


class NonFiniteConfig(Strict):
    """What becomes of a step whose loss, gradient or activations are not finite."""

    skip: PositiveInt = 10
    """The stage leaves out the update and says so; this many such steps in a row end the run."""

    @model_validator(mode="before")
    @classmethod
    def _or_stop(cls, value: Any) -> Any:
        if value == "stop":
            return {"skip": 1}
        if not isinstance(value, Mapping | NonFiniteConfig):
            raise ValueError(f'must be "stop" or {{"skip": n}}, got {value!r}')
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"const": "stop"}, handler.resolve_ref_schema(handler(core))]}
