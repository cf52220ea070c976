"""What one candidate costs: the work of each stage, its traffic, its memory.

The bound on a step is that of the busiest stage, the busiest link, and the round trips of
backpropagation. The assumptions are in docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

from ds_local.cluster.candidates import GIB, Candidate, Cluster, Model, split_backward_of
from ds_local.cluster.prices import Price
from ds_local.cluster.scheme_samples import sample_of, streams_leaving_a_node, timer_for
from ds_local.config.sections import HeadConfig
from ds_local.model.flops import UnitCosts
from ds_local.schedules.simulator import Costs

LOGIT_ROWS = 512  # positions whose logits are alive at once (see `heads.linear_cross_entropy`)


class CandidateCost:
    """A candidate's work and traffic.

    Args:
        cuts: first block of each stage, and the depth.
        unit: seconds of one sequence.
        head: of each stage but the last whose loss trains.
        has_head: of each stage, whether it has one at any time of the run; by default those whose
            loss trains.
    """

    def __init__(
        self,
        candidate: Candidate,
        model: Model,
        cluster: Cluster,
        cuts: Sequence[int],
        unit: UnitCosts,
        zero_stage: int,
        head: HeadConfig | None = None,
        has_head: Sequence[float] = (),
    ) -> None:
        self.candidate, self.model, self.cluster = candidate, model, cluster
        self.zero_stage, self.head = zero_stage, head or HeadConfig()
        self.blocks = [b - a for a, b in pairwise(cuts)]
        scale = candidate.micro_batch
        self.pass_seconds = [scale * unit.block * count / 3 for count in self.blocks]
        self.recompute = [seconds if candidate.recompute else 0.0 for seconds in self.pass_seconds]
        self.sample = sample_of(candidate.scheme, candidate.stages, candidate.micro_batches)
        self.losses = self.sample.losses
        self.has_head = has_head or self.losses
        self.edges, self.rings = streams_leaving_a_node(
            candidate.stages, candidate.replicas, candidate.placement, cluster.devices_per_node
        )
        heads = [
            head * scale * (share > 0) for head, share in zip(unit.heads, self.losses, strict=False)
        ]
        self.heads = [*heads, scale * unit.readout]
        self.message = candidate.micro_batch * model.seq_len * (model.hidden * model.itemsize + 4)
        self.edge_seconds = self._edge_seconds(cluster)
        self.reduced = [self._reduced_bytes(stage) for stage in range(candidate.stages)]
        self.reduce_seconds = [
            2 * size / self._ring_rate(cluster) if candidate.replicas > 1 else 0.0
            for size in self.reduced
        ]
        dealt = candidate.replicas if zero_stage else 1
        self.update_seconds = [
            model.update_seconds * self._trained(stage) / dealt for stage in range(candidate.stages)
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
            (min(cluster.link_gbps / rings, cluster.intra_gbps) if rings else cluster.intra_gbps)
            * 1e9
            / 8
        )

    def _params(self, stage: int) -> float:
        model, last = self.model, self.candidate.stages - 1
        count = self.blocks[stage] * model.block_params
        count += model.embedding_params if stage == 0 else 0
        count += model.readout_params if stage == last else 0
        return count

    def _head_params(self, stage: int) -> tuple[float, float]:
        """(trained, read-only) parameters of the stage's auxiliary head."""
        model, candidate, head = self.model, self.candidate, self.head
        if (
            stage == candidate.stages - 1
            or not self.has_head[stage]
            or not candidate.heads
            or model.config is None
        ):
            return 0, 0
        trained = model.hidden**2 * (head.adapter + bool(head.companion))
        copied, classes = 0, head.classes(model.config.vocab_size)
        blocks = head.blocks_of(stage, sum(self.blocks[stage + 1 :])) * model.block_params
        if head.blocks_from == "next_tracked":
            copied += blocks
        else:
            trained += blocks
        if head.readout == "shared":
            copied += model.readout_params
        elif head.rank:
            trained += head.rank * (model.hidden + classes)
        else:
            trained += model.hidden * classes
        return trained, copied

    def _trained(self, stage: int) -> float:
        return self._params(stage) + self._head_params(stage)[0]

    def _reduced_bytes(self, stage: int) -> float:
        """Gradients (and under ZeRO-1 new weights) that pass through one device's share of a
        ring, one way."""
        replicas = self.candidate.replicas
        return self._trained(stage) * self.model.itemsize * (replicas - 1) / replicas

    @property
    def network_seconds(self) -> float:
        """How long the fullest node's card is busy with all traffic of a step."""
        gradients = self.candidate.micro_batches if self.sample.sends_gradients else 0
        activations = self.candidate.micro_batches * self.edge_seconds
        one_way = max(activations, gradients * self.edge_seconds)
        return one_way + (max(self.reduce_seconds) if self.rings and self.edges else 0.0)

    @cached_property
    def busy(self) -> list[float]:
        """Seconds each stage works in a step, averaging gradients and updating weights
        included."""
        count, last = self.candidate.micro_batches, self.candidate.stages - 1
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
            or self.candidate.stages == 1
            or not self.sample.flushes
        ):
            return 0.0
        # a split backward defers the weight gradient
        passes = 2 if split_backward_of(self.candidate.scheme) else 3
        others = sum(
            passes * one + again
            for one, again in zip(self.pass_seconds[:-1], self.recompute[:-1], strict=True)
        )
        last = passes * self.pass_seconds[-1] + self.recompute[-1] + self.heads[-1]
        travel = 2 * (self.candidate.stages - 1) * self.edge_seconds
        return others + travel + self.candidate.micro_batches * last + self.closing_seconds[0]

    def _memory(self) -> float:
        model, candidate = self.model, self.candidate
        tokens = candidate.micro_batch * model.seq_len
        one_block = tokens * model.kept * model.itemsize
        # weights, gradients; master weights and two moments in fp32, which ZeRO-1 deals to the
        # replicas
        fixed = 2 * model.itemsize if model.itemsize < 4 else 8
        sharded = (12 if model.itemsize < 4 else 8) / (candidate.replicas if self.zero_stage else 1)
        totals = []
        for stage, (live, deferred) in enumerate(
            zip(self.sample.peak_live, self.sample.peak_deferred, strict=True)
        ):
            trained, copied = self._head_params(stage)
            state = (self._params(stage) + trained) * (fixed + sharded) + copied * model.itemsize
            state += self.sample.copies[stage] * self._params(stage) * model.itemsize
            boundary = tokens * model.hidden * model.itemsize
            blocks = self.blocks[stage] * (boundary if candidate.recompute else one_block)
            foreseen = boundary if trained and self.head.companion else 0
            per_live = blocks + boundary + foreseen
            logits = 0 if model.config is None else LOGIT_ROWS * model.config.vocab_size * 8
            # recomputed: one block at a time, and all blocks of a micro-batch whose weight
            # gradients are deferred
            recomputed = (
                one_block * (1 + deferred * self.blocks[stage]) if candidate.recompute else 0
            )
            totals.append(state + live * per_live + recomputed + logits)
        return max(totals) + self.cluster.reserve_gib * GIB

    def price(self, sequences: int) -> Price:
        candidate, model = self.candidate, self.model
        count = candidate.micro_batches
        bound = max(*self.busy, self.network_seconds, self._round_trip())
        slowest = self.busy.index(max(self.busy))
        own = (
            3 * sum(self.pass_seconds) + self.heads[-1]
        )  # an even share of the model is what cannot be saved
        aux = [
            0.0 if s == candidate.stages - 1 else h * self.losses[s]
            for s, h in enumerate(self.heads)
        ]
        parts = {
            "the model's own work": count * own / candidate.stages,
            "auxiliary heads": count * sum(aux) / candidate.stages,
            "recomputing activations": count * sum(self.recompute) / candidate.stages,
            "averaging gradients": self.reduce_seconds[slowest],
            "updating weights": self.update_seconds[slowest],
        }
        parts["stages that cannot be cut evenly"] = max(0.0, max(self.busy) - sum(parts.values()))
        return Price(
            candidate,
            bound,
            sequences * model.seq_len,
            self._memory(),
            parts,
            count * self.message if candidate.stages > 1 else 0.0,
            2 * max(self.reduced) if candidate.replicas > 1 else 0.0,
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
        return timer_for(self.candidate.scheme, self.candidate.stages, micro_batches).steady_period(
            costs
        )
