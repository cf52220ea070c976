"""What a layout of a cluster costs: a lower bound on its step, its memory, and the simulated step.

A layout is a number of stages and replicas, where the stages lie, a row of the route table, heads,
and micro-batches. The bound is that of the busiest stage, the busiest link, and the round trips of
backpropagation. The assumptions are in docs/planning.md.

No processes, no devices. Times in seconds, sizes in bytes unless a name says otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ds_local.config.deepspeed import batch_sizes
from ds_local.config.files import local_parallel
from ds_local.config.schema import SECTION, HeadConfig
from ds_local.errors import ConfigError
from ds_local.model import blocks
from ds_local.model.flops import UnitCosts, choose_parts, unit_flops, unit_times
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Schedule
from ds_local.schedules.simulator import Costs, StepTimer

GIB = 2**30
LOGIT_ROWS = 512  # positions whose logits are alive at once (see `heads.linear_cross_entropy`)

# What a layout may run: the "local_parallel" section of each row.
ROWS: dict[str, dict[str, Any]] = {
    "data parallel": {"mode": "backprop"},  # one stage
    "backprop (1F1B)": {"mode": "backprop"},
    "zero bubble H1": {"mode": "backprop", "split_backward": 1},
    "zero bubble H2": {"mode": "backprop", "split_backward": 2},
    "interlocking 2": {"mode": "interlocking", "window": 2},
    "overlapping 2": {"mode": "overlapping", "window": 2},
    "chunked 2": {"mode": "chunked", "window": 2},
    "chunked 2, split": {"mode": "chunked", "window": 2, "split_backward": 2},
    "mixed 1/2": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
    "mixed 1/4": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
    "local": {"mode": "local"},
}
ONE_IN = {"mixed 1/2": 2, "mixed 1/4": 4}  # micro-batches of a mix run backpropagation
HEADS = {
    "full": HeadConfig(),
    "shared, 1/4 of tokens": HeadConfig(readout="shared", token_fraction=0.25),
    "rank 128, 1/4 of tokens": HeadConfig(rank=128, token_fraction=0.25),
}


def _split(row: str) -> int:
    return ROWS[row].get("split_backward", 0)


def has_heads(row: str) -> bool:
    return ROWS[row].get("mode") != "backprop"


@dataclass(frozen=True)
class Cluster:
    """What the layout runs on."""

    nodes: int
    devices_per_node: int
    tflops: float  # sustained in matrix products of training, per device: peak times the share that is reached
    memory_gib: float  # per device
    link_gbps: float  # of a node's network card, each way, shared by its devices
    intra_gbps: float  # between two devices of a node, each way
    latency_seconds: float = 50e-6  # of a message between nodes
    reserve_gib: float = 2.0  # taken by the runtime, reduction buckets and fragments

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Model:
    """A model's sizes. Times per unit of work come from floating-point operations, or from a
    profile as seconds."""

    depth: int
    hidden: int
    seq_len: int
    costs: (
        UnitCosts | None
    )  # of one sequence in seconds, instead of those that follow from `config`
    config: Any
    block_params: int
    embedding_params: int
    readout_params: int
    kept: int  # numbers a block keeps per token for its backward pass
    itemsize: int = 2  # bytes of an activation
    update_seconds: float = 0.0  # of the optimizer step, per parameter; known from a profile alone

    @classmethod
    def of(cls, config: Any, seq_len: int | None = None, itemsize: int = 2) -> Model:
        """From a Hugging Face config."""
        model, depth = blocks.skeleton(config), blocks.num_blocks(config)
        block = model.get_submodule(f"{blocks.family_of(config).blocks}.0")
        readout = config.vocab_size * config.hidden_size
        size = sum(p.numel() for p in block.parameters())
        everything = sum(p.numel() for p in model.parameters())
        if getattr(config, "tie_word_embeddings", False):
            everything += readout  # stages hold a readout of their own
        # the inputs and outputs of every matrix product; norms and activation functions keep some
        # of the same tensors
        kept = sum(sum(p.shape) for p in block.parameters() if p.dim() == 2)
        return cls(
            depth,
            config.hidden_size,
            seq_len or blocks.num_positions(config),
            None,
            config,
            size,
            everything - depth * size - readout,
            readout,
            kept,
            itemsize,
        )


@dataclass(frozen=True)
class Layout:
    """One way to use the cluster."""

    stages: int
    replicas: int
    row: str
    heads: str  # a key of HEADS, "" where the row has none
    micro_batch: int  # sequences
    micro_batches: int  # per step
    place: str = (
        "across_nodes"  # where the stages of one replica lie, as `layout.stages` of the config
    )
    recompute: bool = False  # activation checkpointing, every block

    def __str__(self) -> str:
        where = "" if self.stages == 1 or self.replicas == 1 else f" {self.place.replace('_', ' ')}"
        heads = f" ({self.heads} heads)" if self.heads else ""
        return (
            f"{self.row}{heads}: {self.stages} stages{where} x {self.replicas} replicas, "
            f"{self.micro_batches} x {self.micro_batch} sequences{', recomputing' if self.recompute else ''}"
        )


@dataclass
class Price:
    """What a layout costs. `step_seconds` is a lower bound until `simulated`."""

    layout: Layout
    step_seconds: float
    tokens: int  # in a step
    memory: float  # on the fullest device
    parts: dict[str, float]  # seconds of a step by cause, on the busiest stage
    bytes_per_edge: float  # over one link between two stages, in a step, the fuller direction
    bytes_reduced: float  # sent by one device to average gradients, in a step
    idle_share: float = math.nan
    simulated: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def loss(self) -> str:
        """What costs it most beside the model's own work."""
        waiting = self.step_seconds - sum(self.parts.values())
        causes = {
            name: seconds for name, seconds in self.parts.items() if name != "the model's own work"
        }
        causes |= {"waiting for other stages or links": waiting}
        cause, seconds = max(causes.items(), key=lambda item: item[1])
        return (
            f"{seconds / self.step_seconds:.0%} of the step is {cause}"
            if seconds > 0.005 * self.step_seconds
            else "nothing much"
        )


def measured_model(model: Model, profile: str | Path) -> Model:
    """The model with times that a run has measured, in place of those that follow from
    floating-point operations.

    Args:
        profile: profile.json of a run.

    Raises:
        ConfigError: when it is missing or holds something else.
    """
    units = unit_times(profile)
    try:
        facts = json.loads(Path(profile).read_text())
        sequences = facts["layout"]["sequences"]
        update = sum(facts["measured"]["update_seconds"]) / sum(facts["measured"]["parameters"])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{profile} lacks what this version writes, profile the run again: {error}"
        ) from error
    heads = [head / sequences for head in units.heads]
    costs = UnitCosts(units.block / sequences, units.readout / sequences, heads)
    return replace(model, costs=costs, update_seconds=update)


def section_for(row: str, micro_batches: int) -> dict[str, Any]:
    """The "local_parallel" section of a row."""
    section = ROWS[row]
    if row in ONE_IN:
        first, second = section["mix"]
        return {"mix": [{**first, "micro_batches": max(1, micro_batches // ONE_IN[row])}, second]}
    return section


@lru_cache(maxsize=4096)
def schedule_for(row: str, stages: int, micro_batches: int) -> Schedule:
    return RunPlan.of(
        local_parallel({SECTION: section_for(row, micro_batches)}), stages, micro_batches
    ).schedule_at(0)


@lru_cache(maxsize=4096)
def timer_for(row: str, stages: int, micro_batches: int) -> StepTimer:
    return StepTimer(schedule_for(row, stages, micro_batches))


class Sample(NamedTuple):
    """What a row asks of its stages."""

    rows: tuple[Any, ...]
    losses: list[float]  # of each stage, the share of micro-batches that compute its loss
    peak_live: tuple[int, ...]
    peak_put_off: tuple[int, ...]
    sends_gradients: bool


@lru_cache(maxsize=4096)
def sample_of(row: str, stages: int, micro_batches: int) -> Sample:
    """From a schedule of at most so many micro-batches."""
    schedule = schedule_for(row, stages, min(micro_batches, 4 * stages))
    rows = schedule.rows
    losses = [
        sum(stage in routes.weights for routes in rows) / len(rows) for stage in range(stages)
    ]
    return Sample(
        rows,
        losses,
        schedule.peak_live,
        schedule.peak_put_off,
        schedule.message_counts()["gradients"] > 0,
    )


@lru_cache(maxsize=4096)
def streams_leaving_a_node(
    stages: int, replicas: int, place: str, devices_per_node: int
) -> tuple[int, int]:
    """Of the fullest node: (activations to a next stage elsewhere, rings of replicas that go on
    elsewhere).

    Rank = stage x replicas + replica where stages lie across nodes, replica x stages + stage within
    a node.
    """
    across = place == "across_nodes"
    ranks = np.arange(stages * replicas)
    stage, replica = (
        (ranks // replicas, ranks % replicas) if across else (ranks % stages, ranks // stages)
    )

    def node(of_stage: Any, of_replica: Any) -> Any:
        rank = of_stage * replicas + of_replica if across else of_replica * stages + of_stage
        return rank // devices_per_node

    here = ranks // devices_per_node
    edges = here[(stage + 1 < stages) & (node(np.minimum(stage + 1, stages - 1), replica) != here)]
    rings = here[(replicas > 1) & (node(stage, (replica + 1) % replicas) != here)]
    return int(np.bincount(edges, minlength=1).max()), int(np.bincount(rings, minlength=1).max())


class Pricing:
    """Prices layouts of one model on one cluster."""

    def __init__(self, model: Model, cluster: Cluster, sequences: int, zero_stage: int = 1) -> None:
        self.model, self.cluster, self.sequences, self.zero_stage = (
            model,
            cluster,
            sequences,
            zero_stage,
        )
        self._cuts: dict[tuple[str, int, str], list[int]] = {}
        self._flops: dict[tuple[str, int], UnitCosts] = {}

    def price(self, layout: Layout) -> Price:
        """Lower bound on the step, and memory; recomputes activations where they would not fit
        otherwise."""
        price = self._Layout(self, layout).price()
        if (
            price.memory > self.cluster.memory_gib * GIB
            and not layout.recompute
            and self.model.kept
        ):
            price = self._Layout(self, replace(layout, recompute=True)).price()
        return price

    def simulate(self, price: Price) -> Price:
        """The step as the simulator sees it. Long steps are shortened: beyond some rounds of the
        pipeline time grows evenly."""
        work = self._Layout(self, price.layout)
        stages, wanted = price.layout.stages, price.layout.micro_batches
        rounds = 4 if work.sample.sends_gradients else 1
        shorter = [
            4 * rounds * -(-stages // 4),
            4 * (rounds + 1) * -(-stages // 4),
        ]  # mixes need multiples of 4
        if wanted <= shorter[1] or stages * wanted <= 1024:
            period = work.period(wanted)
        else:
            first, second = (work.period(count) for count in shorter)
            period = second + (second - first) / (shorter[1] - shorter[0]) * (wanted - shorter[1])
        seconds = max(period, work.network_seconds)
        return replace(
            price,
            step_seconds=seconds,
            idle_share=max(0.0, 1 - work.mean_busy / seconds),
            simulated=True,
        )

    def unit(self, heads: str, segments: int) -> UnitCosts:
        """Seconds of one sequence."""
        model = self.model
        if model.costs is not None:
            return model.costs._replace(heads=(model.costs.heads[:1] or [0.0]) * (segments - 1))
        key = heads, segments
        if key not in self._flops:
            self._flops[key] = unit_flops(
                model.config, HEADS[heads or "full"], segments, model.seq_len
            )
        flops = self._flops[key]
        second = self.cluster.tflops * 1e12 / model.seq_len
        return UnitCosts(
            flops.block / second, flops.readout / second, [head / second for head in flops.heads]
        )

    def cuts(self, layout: Layout) -> list[int]:
        """First block of each stage, and the depth."""
        key = layout.row, layout.stages, layout.heads
        if key not in self._cuts:
            if self.model.config is None:
                even = [
                    stage * self.model.depth // layout.stages for stage in range(layout.stages + 1)
                ]
                self._cuts[key] = even
                return even
            checked = local_parallel(
                {SECTION: ROWS[layout.row] | {"head": HEADS[layout.heads or "full"].model_dump()}}
            )
            parts = choose_parts(
                self.model.config, checked, layout.stages, max(4, layout.stages), self.model.seq_len
            )
            self._cuts[key] = [max(0, min(part - 1, self.model.depth)) for part in parts]
        return self._cuts[key]

    class _Layout:
        """A layout's work and traffic."""

        def __init__(self, pricing: Pricing, layout: Layout) -> None:
            self.pricing, self.layout = pricing, layout
            model, cluster = pricing.model, pricing.cluster
            self.blocks = [b - a for a, b in pairwise(pricing.cuts(layout))]
            unit = pricing.unit(layout.heads, layout.stages)
            scale = layout.micro_batch
            self.pass_seconds = [scale * unit.block * count / 3 for count in self.blocks]
            self.recompute = [seconds if layout.recompute else 0.0 for seconds in self.pass_seconds]
            self.sample = sample_of(layout.row, layout.stages, layout.micro_batches)
            self.losses = self.sample.losses
            self.edges, self.rings = streams_leaving_a_node(
                layout.stages, layout.replicas, layout.place, cluster.devices_per_node
            )
            heads = [
                head * scale * (share > 0)
                for head, share in zip(unit.heads, self.losses, strict=False)
            ]
            self.heads = [*heads, scale * unit.readout]
            self.message = layout.micro_batch * model.seq_len * (model.hidden * model.itemsize + 4)
            self.edge_seconds = self._edge_seconds(cluster)
            self.reduced = [self._reduced_bytes(stage) for stage in range(layout.stages)]
            self.reduce_seconds = [
                2 * size / self._ring_rate(cluster) if layout.replicas > 1 else 0.0
                for size in self.reduced
            ]
            dealt = layout.replicas if pricing.zero_stage else 1
            self.update_seconds = [
                model.update_seconds * self._trained(stage) / dealt
                for stage in range(layout.stages)
            ]
            self.closing_seconds = [
                sum(pair) for pair in zip(self.reduce_seconds, self.update_seconds, strict=True)
            ]

        def _edge_seconds(self, cluster: Cluster) -> float:
            crossing = self.edges
            if not crossing:
                return 8 * self.message / (cluster.intra_gbps * 1e9)
            return 8 * self.message * crossing / (cluster.link_gbps * 1e9) + cluster.latency_seconds

        def _ring_rate(self, cluster: Cluster) -> float:
            """Bytes per second of one ring that averages gradients."""
            rings = self.rings
            return (
                (
                    min(cluster.link_gbps / rings, cluster.intra_gbps)
                    if rings
                    else cluster.intra_gbps
                )
                * 1e9
                / 8
            )

        def _params(self, stage: int) -> float:
            model, last = self.pricing.model, self.layout.stages - 1
            count = self.blocks[stage] * model.block_params
            count += model.embedding_params if stage == 0 else 0
            count += model.readout_params if stage == last else 0
            return count

        def _head_params(self, stage: int) -> tuple[float, float]:
            """(trained, read-only) parameters of the stage's auxiliary head."""
            model, layout = self.pricing.model, self.layout
            if (
                stage == layout.stages - 1
                or not self.losses[stage]
                or not layout.heads
                or model.config is None
            ):
                return 0, 0
            head = HEADS[layout.heads]
            if head.readout == "shared":
                return 0, model.readout_params
            return (
                head.rank * (model.hidden + model.config.vocab_size)
                if head.rank
                else model.readout_params
            ), 0

        def _trained(self, stage: int) -> float:
            return self._params(stage) + self._head_params(stage)[0]

        def _reduced_bytes(self, stage: int) -> float:
            """Gradients (and under ZeRO-1 new weights) that pass through one device's share of a
            ring, one way."""
            replicas = self.layout.replicas
            return self._trained(stage) * self.pricing.model.itemsize * (replicas - 1) / replicas

        @property
        def network_seconds(self) -> float:
            """How long the fullest node's card is busy with all traffic of a step."""
            gradients = self.layout.micro_batches if self.sample.sends_gradients else 0
            activations = self.layout.micro_batches * self.edge_seconds
            one_way = max(activations, gradients * self.edge_seconds)
            return one_way + (max(self.reduce_seconds) if self.rings and self.edges else 0.0)

        @cached_property
        def busy(self) -> list[float]:
            """Seconds each stage works in a step, averaging gradients and updating weights
            included."""
            count, last = self.layout.micro_batches, self.layout.stages - 1
            return [
                count * (3 * one + again + head * (1 if stage == last else share)) + closing
                for stage, (one, again, head, share, closing) in enumerate(
                    zip(
                        self.pass_seconds,
                        self.recompute,
                        self.heads,
                        self.losses,
                        self.closing_seconds,
                        strict=True,
                    )
                )
            ]

        @property
        def mean_busy(self) -> float:
            return sum(self.busy) / len(self.busy)

        def _round_trip(self) -> float:
            """Nothing of backpropagation's step can be faster: up, all micro-batches on the last
            stage, down, reduce."""
            if (
                not all(row.mode == "backprop" for row in self.sample.rows)
                or self.layout.stages == 1
            ):
                return 0.0
            passes = (
                2 if _split(self.layout.row) else 3
            )  # without the weight gradient, which is put off
            others = sum(
                passes * one + again
                for one, again in zip(self.pass_seconds[:-1], self.recompute[:-1], strict=True)
            )
            last = passes * self.pass_seconds[-1] + self.recompute[-1] + self.heads[-1]
            travel = 2 * (self.layout.stages - 1) * self.edge_seconds
            return others + travel + self.layout.micro_batches * last + self.closing_seconds[0]

        def _memory(self) -> float:
            model, layout = self.pricing.model, self.layout
            tokens = layout.micro_batch * model.seq_len
            one_block = tokens * model.kept * model.itemsize
            # weights, gradients; master weights and two moments in fp32, which ZeRO-1 deals to the
            # replicas
            fixed = 2 * model.itemsize if model.itemsize < 4 else 8
            sharded = (12 if model.itemsize < 4 else 8) / (
                layout.replicas if self.pricing.zero_stage else 1
            )
            totals = []
            for stage, (live, put_off) in enumerate(
                zip(self.sample.peak_live, self.sample.peak_put_off, strict=True)
            ):
                trained, copied = self._head_params(stage)
                state = (self._params(stage) + trained) * (
                    fixed + sharded
                ) + copied * model.itemsize
                boundary = tokens * model.hidden * model.itemsize
                per_live = (
                    self.blocks[stage] * (boundary if layout.recompute else one_block) + boundary
                )
                logits = 0 if model.config is None else LOGIT_ROWS * model.config.vocab_size * 8
                # recomputed: one block at a time, and all blocks of a micro-batch whose weight
                # gradients are put off
                recomputed = (
                    one_block * (1 + put_off * self.blocks[stage]) if layout.recompute else 0
                )
                totals.append(state + live * per_live + recomputed + logits)
            return max(totals) + self.pricing.cluster.reserve_gib * GIB

        def price(self) -> Price:
            layout, model = self.layout, self.pricing.model
            count = layout.micro_batches
            bound = max(*self.busy, self.network_seconds, self._round_trip())
            slowest = self.busy.index(max(self.busy))
            own = (
                3 * sum(self.pass_seconds) + self.heads[-1]
            )  # an even share of the model is what cannot be saved
            aux = [
                0.0 if s == layout.stages - 1 else h * self.losses[s]
                for s, h in enumerate(self.heads)
            ]
            parts = {
                "the model's own work": count * own / layout.stages,
                "auxiliary heads": count * sum(aux) / layout.stages,
                "recomputing activations": count * sum(self.recompute) / layout.stages,
                "averaging gradients": self.reduce_seconds[slowest],
                "updating weights": self.update_seconds[slowest],
            }
            parts["stages that cannot be cut evenly"] = max(
                0.0, max(self.busy) - sum(parts.values())
            )
            return Price(
                layout,
                bound,
                self.pricing.sequences * model.seq_len,
                self._memory(),
                parts,
                count * self.message if layout.stages > 1 else 0.0,
                2 * max(self.reduced) if layout.replicas > 1 else 0.0,
            )

        def period(self, micro_batches: int) -> float:
            """Seconds of a simulated step of so many micro-batches."""
            backward = [
                one + again for one, again in zip(self.pass_seconds, self.recompute, strict=True)
            ]
            costs = Costs(
                forward=self.pass_seconds,
                input_grad=backward,
                weight_grad=self.pass_seconds,
                head=self.heads,
                link=self.edge_seconds,
                optimizer=self.closing_seconds,
            )
            return timer_for(self.layout.row, self.layout.stages, micro_batches).steady_period(
                costs
            )


def expected_memory(hf_config: Any, config: Mapping[str, Any], stages: int, replicas: int) -> float:
    """Bytes on the fullest device of a run with this DeepSpeed config; its scheme and heads taken
    for the nearest known."""
    section = local_parallel(config)
    micro_batch, micro_batches = batch_sizes(config, replicas)
    scheme = section.scheme_at(0)
    wanted = "mixed" if scheme.mix else scheme.mode
    rows = [
        row
        for row, of in ROWS.items()
        if of.get("mode", "mixed") == wanted and _split(row) <= section.split_backward
    ]
    row = (
        "data parallel" if stages == 1 else max(reversed(rows), key=_split, default="local")
    )  # of equals the last
    heads = (
        ""
        if not has_heads(row)
        else "shared, 1/4 of tokens"
        if section.head.readout == "shared"
        else "full"
    )
    itemsize = 2 if config.get("bf16", config.get("bfloat16", {})).get("enabled") else 4
    recompute = bool(config.get("pipeline", {}).get("activation_checkpoint_interval"))
    layout = Layout(
        stages, replicas, row, heads, micro_batch, micro_batches, section.layout.stages, recompute
    )
    unlimited = Cluster(
        1, stages * replicas, tflops=1, memory_gib=math.inf, link_gbps=1, intra_gbps=1
    )
    zero_stage = config.get("zero_optimization", {}).get("stage", 0)
    pricing = Pricing(
        Model.of(hf_config, itemsize=itemsize),
        unlimited,
        micro_batch * micro_batches * replicas,
        zero_stage,
    )
    return pricing.price(layout).memory
