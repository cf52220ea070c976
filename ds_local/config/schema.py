"""The "local_parallel" section of ds_config.json.

DeepSpeed reads the same file and ignores our section. Inside it an unknown key is an error that
names the nearest key.

No torch, no DeepSpeed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ds_local.errors import ConfigError

SECTION = "local_parallel"


Seconds = Annotated[PositiveFloat, Field(le=1e7)]  # four months


class OptionOf(NamedTuple):
    """Marks a key that means something for some values of another key of its object only."""

    key: str
    values: tuple[str, ...]


def _plain(value: Any) -> Any:
    """JSON has one kind of list, and writes integers as 1e3 too."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Strict(BaseModel):
    """Refuses keys it does not know, values of another kind, NaN, and options not in use."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of keys -> what they are called now. Both are read for two minor versions."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = {key: _plain(value) for key, value in given.items()}
        for old, new in ((o, n) for o, n in cls.renamed.items() if o in given):
            if new in given:
                raise ValueError(f"{old} is the old name of {new}, and both are there: remove it")
            warnings.warn(
                f"{SECTION}: {old} is called {new} now; rename it in the config, since the old "
                "name will be refused one day",
                FutureWarning,
                stacklevel=2,
            )
            given = {new if key == old else key: value for key, value in given.items()}
        return given

    @classmethod
    def options(cls) -> dict[str, OptionOf]:
        """The keys that depend on the value of another key."""
        marks = {name: field.metadata for name, field in cls.model_fields.items()}
        return {n: mark for n, of in marks.items() for mark in of if isinstance(mark, OptionOf)}

    @model_validator(mode="after")
    def _options_in_use(self) -> Strict:
        for name, option in self.options().items():
            value = getattr(self, option.key)
            chosen = {value} if isinstance(value, str) else set(value)
            if name in self.model_fields_set and not chosen & set(option.values):
                raise ValueError(
                    f"{name} means nothing with {option.key} {value!r}; remove it, or set "
                    f"{option.key} to {' or '.join(option.values)}"
                )
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        conditions = []
        for name, option in cls.options().items():
            chosen = {"enum": list(option.values)}
            one_of = {"anyOf": [chosen, {"type": "array", "contains": chosen}]}
            then = {"required": [option.key], "properties": {option.key: one_of}}
            conditions.append({"if": {"required": [name]}, "then": then})
        return schema | ({"allOf": conditions} if conditions else {})


Mode = Literal[
    "backprop",
    "local",
    "chunked",
    "shifted_chunked",
    "overlapping",
    "interlocking",
    "deep_supervision",
]


class Row(Strict):
    """One row of the route table (see `routes.py`)."""

    mode: Mode = "local"
    """Which loss trains which segment."""
    window: PositiveInt | None = None
    """Segments in a chunk, losses a segment hears, or loss distance plus one. Default 2 where the
    mode takes one."""
    combine: Literal["sum", "mean"] = "sum"
    """How overlapping combines the losses a segment hears."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Factors of the losses of deep_supervision, one per segment. Default all 1."""

    @property
    def period(self) -> int:
        """Steps after which schedules repeat: more than 1 where chunks shift."""
        return self.window or 2 if self.mode == "shifted_chunked" else 1


class MixEntry(Row):
    """A row that some micro-batches of each step follow."""

    micro_batches: PositiveInt | Literal["auto"] | None = None
    """How many micro-batches of a step follow this row. Left out in one entry: that one takes the
    rest. "auto": as many as the pipeline can hide, one segment on each stage: half of them where
    they are twice as many as the segments."""


class Scheme(Row):
    """One row for all micro-batches of a step, or a mix of rows."""

    mix: tuple[MixEntry, ...] | None = None
    """Rows of the micro-batches of one step, those that should go first at the front. Replaces
    `mode`."""
    correction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """How far the first of two rows in a mix makes up for what the second one learns from: 0, not
    at all; 1, the mean gradient of a step is the first row's (a control variate), with more
    noise."""
    run_ahead: Annotated[NonNegativeInt, Field(le=2**16)] | Literal["auto"] = 0
    """Forwards of later steps that a segment may run before it updates, where gradients cross
    segments: no stage waits for gradients to come back. Every update takes its own step's
    micro-batches, but some of them went forward, and go backward, with older weights, of which a
    stage keeps copies. "auto": as many as leave no stage waiting, one for each segment up to the
    furthest loss, two or more where `link.transfer` says that links are slow."""
    predict_weights: bool = False
    """With run_ahead: micro-batches that cross an update go forward and backward with weights on
    which the last update is added once more for each update they cross. Costs one more copy."""
    delay_discount: Annotated[NonNegativeFloat, Field(le=10)] = 0.0
    """With run_ahead: a segment's learning rate is divided by 1 + its delay, in steps on average, to
    this power."""

    @model_validator(mode="after")
    def _mode_or_mix(self) -> Scheme:
        if self.mix is not None:
            clash = self.model_fields_set & set(Row.model_fields)
            if clash:
                raise ValueError(f"give either mix or {', '.join(sorted(clash))}, not both")
            if not self.mix or sum(entry.micro_batches is None for entry in self.mix) > 1:
                raise ValueError(
                    "mix needs at least one entry, and at most one entry without micro_batches"
                )
            if [entry.micro_batches for entry in self.mix] != ["auto", None] and any(
                e.micro_batches == "auto" for e in self.mix
            ):
                raise ValueError(
                    'micro_batches "auto" is for the first of two entries, the second one takes the rest'
                )
        if self.correction and len(self.mix or ()) != 2:
            raise ValueError(
                f"correction is between the two entries of a mix, got {len(self.mix or ())}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _runs_ahead_of_gradients(self) -> Scheme:
        rows = self.mix or (self,)
        if not self.run_ahead:
            for name in ("predict_weights", "delay_discount"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} corrects what run_ahead delays: set run_ahead, or leave it out"
                    )
            return self
        if all(row.mode == "local" for row in rows):
            raise ValueError(
                "run_ahead is for gradients that cross segments, and with mode 'local' none does: "
                "leave it out"
            )
        if any(row.mode == "shifted_chunked" for row in rows):
            raise ValueError(
                "run_ahead needs the same chunks in every step, and those of mode 'shifted_chunked' "
                "move: use 'chunked', or leave run_ahead out"
            )
        if any(entry.micro_batches == "auto" for entry in self.mix or ()):
            raise ValueError(
                'run_ahead hides any number of micro-batches: give a number instead of "auto", or '
                "leave run_ahead out"
            )
        return self

    @property
    def period(self) -> int:
        """Steps after which schedules repeat: that of the row, or of the mix."""
        return math.lcm(*(entry.period for entry in self.mix)) if self.mix else super().period


class Phase(Scheme):
    """A scheme that holds for a stretch of the run."""

    until_step: PositiveInt | None = None
    """First optimizer step (counted from 0) that no longer follows this phase. Only the last phase
    leaves it out."""


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

    def codec_above(self, segment: int) -> CodecName:
        """The codec of the link from `segment` to the next."""
        return self.codec if isinstance(self.codec, str) else self.codec[segment]


class LayoutConfig(Strict):
    """Which ranks hold which stage."""

    stages: Literal["across_nodes", "within_node"] = "across_nodes"
    """What crosses machines: the edges between stages (rank = stage x replicas + replica), which
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
    temperature: bool = False
    """Learn a factor on the logits."""
    token_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the positions of a micro-batch whose loss is computed in training."""
    every: PositiveInt = 1
    """Auxiliary losses are computed for one in so many micro-batches, and count that much more."""
    kernel: Literal["torch", "checkpointed", "liger", "cce"] = "torch"
    """What computes large losses (see `heads.linear_cross_entropy`); liger and cce need their
    packages and a GPU."""

    @model_validator(mode="after")
    def _rank_of_its_own(self) -> HeadConfig:
        if self.rank is not None and self.readout == "shared":
            raise ValueError(
                "a shared readout has the full width; leave rank out, or use a private readout"
            )
        if self.rank is not None and self.init == "model":
            raise ValueError("the model's readout has the full width; leave rank out, or init")
        return self

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
                f"partition must name attention_heads, mlp or both, once each, got {list(self.partition)}"
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


class LocalParallelConfig(Scheme):
    """The "local_parallel" section."""

    num_stages: PositiveInt | None = None
    """Pipeline stages. Default: given by the caller or the command line."""
    segments_per_stage: PositiveInt = 1
    """Segments each stage holds; K = num_stages x segments_per_stage."""
    phases: tuple[Phase, ...] | None = None
    """Schemes for successive stretches of the run. Replaces `mode` and `mix`."""
    cycle_steps: PositiveInt | None = None
    """Phases start over after so many optimizer steps. Default: never."""
    partition: str = "cost"
    """How `causal_lm` models are cut: "cost" balances floating-point operations (heads and readout
    included), "uniform" gives each segment as many blocks; or the path of a profile.json, whose
    measured times are balanced."""
    parts: tuple[NonNegativeInt, ...] | None = None
    """Layer boundaries of the segments, K + 1 increasing numbers from 0 to the number of layers.
    Replaces `partition`."""
    layout: LayoutConfig = LayoutConfig()
    """Which ranks hold which stage."""
    link: LinkConfig = LinkConfig()
    """Messages between stages."""
    head: HeadConfig = HeadConfig()
    """Auxiliary heads."""
    split_backward: Annotated[int, Field(ge=0, le=2)] = 0
    """Send input gradients first and put the weight gradients of linear layers off into the time in
    which a stage would wait, in chunks and under backpropagation; meant for one segment a stage. 1:
    with as many live micro-batches on every stage as 1F1B has on its first (ZB-H1); 2: with twice
    as many, which leaves no bubble from 2P - 1 micro-batches a step on (ZB-H2). What is put off
    keeps the inputs and output gradients of its layers, under activation checkpointing too."""
    loss_weighting: Literal["micro_batch", "token"] = "micro_batch"
    """What counts the same in a step: its micro-batches (and replicas), as in DeepSpeed, or the
    tokens that they predict, as in an evaluation, over all micro-batches and the replicas that
    average gradients. "token" reads a step's micro-batches before its first forward; it needs a
    language model."""
    compile: bool = False
    """`torch.compile` every layer and head, as `engine.compile()` does, which also takes a backend
    and its options."""
    replicas: ReplicasConfig = ReplicasConfig()
    """The data-parallel axis."""
    on_nonfinite: NonFiniteConfig = NonFiniteConfig()
    """What becomes of a step whose loss, gradient or activations are not finite. "stop": the first
    one ends the run, as {"skip": 1} does."""
    seed: NonNegativeInt = 1234
    """Seed of weights and dropout."""
    diagnostics: bool = False
    """At every validation compare each segment's local gradient with the true one, and look at the
    hidden states between segments (`diagnostics.py`). Needs fp32 and ZeRO stage 0."""
    lr_multipliers: tuple[PositiveFloat, ...] | None = None
    """Factors on the learning rate, one per segment."""
    clip_multipliers: tuple[PositiveFloat, ...] | None = None
    """Factors on gradient_clipping, one per segment (fp32 without ZeRO, where every segment is
    clipped by itself)."""
    warmup_stagger: NonNegativeInt = 0
    """Segment s ramps its learning rate up over s times so many steps, on top of the scheduler's
    warm-up."""

    @model_validator(mode="after")
    def _compiled_whole(self) -> LocalParallelConfig:
        if self.compile and self.split_backward:
            raise ValueError(
                "compile makes one piece of what split_backward takes apart; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _runs_ahead_alone(self) -> LocalParallelConfig:
        if not any(scheme.run_ahead for _, scheme in self.schemes()):
            return self
        apart = self.replicas.sync != "gradients"
        for key, is_set, why in (
            ("split_backward", self.split_backward, "leaves no time for"),
            ("diagnostics", self.diagnostics, "has no gradients of the same weights to compare in"),
            ("replicas.sync", apart, "needs the same weights on all replicas, without"),
        ):
            if is_set:
                raise ValueError(f"run_ahead {why} {key}: leave one of them out")
        return self

    @model_validator(mode="after")
    def _no_copies_of_parts(self) -> LocalParallelConfig:
        if (
            self.replicas.sync == "subnets"
            and self.head.blocks_from == "next_tracked"
            and self.head.blocks
        ):
            raise ValueError(
                "head.blocks_from 'next_tracked' follows whole blocks, but with replicas.sync 'subnets' each replica holds "
                "a part of them; use 'next' or 'new'"
            )
        return self

    @model_validator(mode="after")
    def _phases_in_order(self) -> LocalParallelConfig:
        if self.phases is not None:
            clash = self.model_fields_set & set(Scheme.model_fields)
            if clash:
                raise ValueError(f"give either phases or {', '.join(sorted(clash))}, not both")
            given = [phase.until_step for phase in self.phases]
            ends = [end for end in given if end is not None]
            if (
                len(ends) != len(given) - 1
                or given[-1] is not None
                or any(a >= b for a, b in pairwise(ends))
            ):
                raise ValueError(
                    f"phases need increasing until_step values and a last phase without one, got {given}"
                )
        if self.cycle_steps is not None:
            self._check_cycle(self.cycle_steps)
        return self

    def _check_cycle(self, steps: int) -> None:
        last_start = self.schemes()[-1][0]
        if not last_start or last_start >= steps:
            raise ValueError(
                f"cycle_steps must end in the last of several phases, after step {last_start}, got {steps}"
            )
        period = math.lcm(*(scheme.period for _, scheme in self.schemes()))
        if steps % period:
            raise ValueError(
                f"shifted chunks come round every {period} steps: make cycle_steps a multiple of that, got {steps}"
            )

    def check_lengths(self, num_segments: int) -> None:
        """Raises ConfigError when a list with an entry per segment has another length."""
        lists = {
            "lr_multipliers": (self.lr_multipliers, num_segments),
            "clip_multipliers": (self.clip_multipliers, num_segments),
            "head.blocks": (self.head.blocks, num_segments - 1),
            "link.codec": (self.link.codec, num_segments - 1),
        }
        for key, (value, wanted) in lists.items():
            if isinstance(value, tuple) and len(value) != wanted:
                raise ConfigError(
                    f"{SECTION}.{key} has {len(value)} entries; {num_segments} segments need {wanted}: change the list"
                )

    @property
    def scales_learning_rates(self) -> bool:
        discounts = any(scheme.delay_discount for _, scheme in self.schemes())
        return self.lr_multipliers is not None or self.warmup_stagger > 0 or discounts

    def lr_multiplier(self, segment: int, step: int) -> float:
        """Factor on a segment's learning rate in optimizer step `step` (counted from 0)."""
        ramp = min(1.0, (step + 1) / (1 + segment * self.warmup_stagger))
        return ramp * (self.lr_multipliers[segment] if self.lr_multipliers else 1.0)

    def clip_multiplier(self, segment: int) -> float:
        return self.clip_multipliers[segment] if self.clip_multipliers else 1.0

    def scheme_at(self, step: int) -> Scheme:
        """The scheme of optimizer step `step` (counted from 0)."""
        step %= self.cycle_steps or step + 1
        for phase in self.phases or ():
            if phase.until_step is None or step < phase.until_step:
                return phase
        return self

    def last_of_phase(self, step: int) -> int | None:
        """The last step of the phase that `step` is in; None: it does not end."""
        ends = [phase.until_step for phase in self.phases or ()] or [None]
        within = step % self.cycle_steps if self.cycle_steps else step
        end = next(end for end in ends if end is None or within < end) or self.cycle_steps
        return None if end is None else step - within + end - 1

    def distinct_steps(self) -> list[int]:
        """Steps whose schedules together show every schedule of the run."""
        return [
            step for start, scheme in self.schemes() for step in range(start, start + scheme.period)
        ]

    def schemes(self) -> list[tuple[int, Scheme]]:
        """(first step, scheme) of every stretch of the run."""
        starts = [0, *(phase.until_step or 0 for phase in self.phases or ())]
        return list(zip(starts, self.phases or (self,), strict=False))
