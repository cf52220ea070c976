"""Prices candidates: a lower bound on the step, memory, and the simulated step.

No processes, no devices. Times in seconds, sizes in bytes unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_local.cluster.candidate_cost import CandidateCost
from ds_local.cluster.candidates import (
    GIB,
    HEADS,
    PLANNED,
    Candidate,
    Cluster,
    Model,
    has_heads,
    head_config,
    parts_of,
    split_backward_of,
)
from ds_local.cluster.learning import BACKPROPS, Learning, learning_of
from ds_local.cluster.prices import Price, over_the_run
from ds_local.cluster.scheme_samples import delay_of, sample_of, section_for
from ds_local.config.catalog import Section
from ds_local.config.deepspeed import batch_sizes, bf16_enabled, zero_stage
from ds_local.config.files import local_parallel
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.scheme import Scheme
from ds_local.config.sections import HeadConfig
from ds_local.config.strict import SECTION
from ds_local.model.flops import UnitCosts, choose_parts, unit_flops, with_heads
from ds_local.model.head_times import time_over_flops


class Pricing:
    """Prices layouts of one model on one cluster.

    Args:
        sequences: of a step, over the whole cluster.
        tokens_only: take a token to be worth the same in every scheme.
        heads: options of those that candidates name.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        sequences: int,
        zero_stage: int = 1,
        tokens_only: bool = True,
        heads: Mapping[str, Section] = HEADS,
    ) -> None:
        self.model, self.cluster, self.sequences = model, cluster, sequences
        self.zero_stage, self.tokens_only = zero_stage, tokens_only
        self._options: dict[str, Section] = {"": {}, **heads}  # schemes without: as with a full one
        vocabulary = 1 if model.config is None else model.config.vocab_size
        self._heads = {
            name: head_config(options, vocabulary) for name, options in self._options.items()
        }
        self._cuts: dict[tuple[str, int, str], list[int]] = {}
        self._units: dict[tuple[str, int], UnitCosts] = {}

    def price(self, candidate: Candidate) -> Price:
        """Lower bound on the step, and memory; recomputes activations where they would not fit
        otherwise."""
        price = self._bound(candidate)
        if (
            price.memory > self.cluster.memory_gib * GIB
            and not candidate.recompute
            and self.model.kept
        ):
            price = self._bound(replace(candidate, recompute=True))
        return replace(price, learning=self._learning(candidate))

    def _bound(self, candidate: Candidate) -> Price:
        parts = [(share, cost.price(self.sequences)) for share, cost in self._parts(candidate)]
        return over_the_run(candidate, parts)

    def _learning(self, candidate: Candidate) -> Learning:
        if self.tokens_only:
            return BACKPROPS
        (_, scheme), *end = parts_of(candidate.scheme)
        return learning_of(
            scheme,
            self._options[candidate.heads],
            candidate.stages,
            self.model.ratio,
            delay_of(scheme, candidate.stages, candidate.micro_batches),
            end[0][0] if end else 0.0,
        )

    def simulate(self, price: Price) -> Price:
        """The step as the simulator sees it."""
        parts = [
            (share, self._simulate(cost, cost.price(self.sequences)))
            for share, cost in self._parts(price.candidate)
        ]
        return replace(over_the_run(price.candidate, parts), learning=price.learning)

    def _simulate(self, work: CandidateCost, price: Price) -> Price:
        """Long steps are shortened: beyond some rounds of the pipeline time grows evenly."""
        stages, wanted = price.candidate.stages, price.candidate.micro_batches
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
        # in a short step another stage may be the busiest, and time grow more slowly
        seconds = max(period, *work.busy, work.network_seconds)
        return replace(
            price,
            step_seconds=seconds,
            idle_share=max(0.0, 1 - work.mean_busy / seconds),
            simulated=True,
        )

    def _parts(self, candidate: Candidate) -> list[tuple[float, CandidateCost]]:
        """(share of the steps, cost) of each part of a run."""
        shares, schemes = zip(*parts_of(candidate.scheme), strict=True)
        return list(zip(shares, self._costs(candidate, schemes), strict=True))

    def _costs(self, candidate: Candidate, schemes: Sequence[str]) -> list[CandidateCost]:
        """Of a run that follows these schemes one after the other, with the cuts of the first."""
        parts = [replace(candidate, scheme=scheme) for scheme in schemes]
        losses = [sample_of(part.scheme, part.stages, part.micro_batches).losses for part in parts]
        has_head = [max(shares) for shares in zip(*losses, strict=True)]
        unit, cuts = self.unit(candidate.heads, candidate.stages), self.cuts(parts[0])
        head = self._heads[candidate.heads]
        return [
            CandidateCost(
                part, self.model, self.cluster, cuts, unit, self.zero_stage, head, has_head
            )
            for part in parts
        ]

    def memory(self, candidate: Candidate, schemes: Sequence[str]) -> float:
        """Of a run that follows these schemes one after the other."""
        costs = self._costs(candidate, schemes)
        return max(cost.price(self.sequences).memory for cost in costs)

    def unit(self, heads: str, segments: int) -> UnitCosts:
        """Seconds of one sequence."""
        key = heads, segments
        if key not in self._units:
            self._units[key] = self._unit(self._heads[heads], segments)
        return self._units[key]

    def _unit(self, head: HeadConfig, segments: int) -> UnitCosts:
        model = self.model
        if model.costs is not None:
            known = model.costs._replace(heads=model.costs.heads[:1] * (segments - 1))
            if model.config is None or any(known.heads):
                return known
            unit = with_heads(known, model.config, head, segments, model.seq_len)
        else:
            flops = unit_flops(model.config, head, segments, model.seq_len)
            second = self.cluster.tflops * 1e12 / model.seq_len
            heads = [one / second for one in flops.heads]
            unit = UnitCosts(flops.block / second, flops.readout / second, heads)
        factor = time_over_flops(head, model.config.vocab_size)
        return unit._replace(heads=[one * factor for one in unit.heads])

    def cuts(self, candidate: Candidate) -> list[int]:
        """First block of each stage, and the depth, of a candidate with one scheme to its end."""
        key = candidate.scheme, candidate.stages, candidate.heads
        if key not in self._cuts:
            if self.model.config is None:
                even = [
                    stage * self.model.depth // candidate.stages
                    for stage in range(candidate.stages + 1)
                ]
                self._cuts[key] = even
                return even
            checked = local_parallel(
                {
                    SECTION: section_for(candidate.scheme, 1)
                    | {"head": self._heads[candidate.heads].model_dump()}
                }
            )
            parts = choose_parts(
                self.model.config,
                checked,
                candidate.stages,
                max(4, candidate.stages),
                self.model.seq_len,
            )
            self._cuts[key] = [max(0, min(part - 1, self.model.depth)) for part in parts]
        return self._cuts[key]


def expected_memory(
    hf_config: Any,
    config: Mapping[str, Any],
    stages: int,
    replicas: int,
    seq_len: int | None = None,
) -> float:
    """Bytes on the fullest device of a run with this DeepSpeed config; the scheme of each phase is
    taken for the nearest known, and its sequences, without `seq_len`, for the longest that the
    model takes."""
    section = local_parallel(config)
    micro_batch, micro_batches = batch_sizes(config, replicas)
    schemes = list(
        dict.fromkeys(_nearest_name(scheme, section, stages) for _, scheme in section.schemes())
    )
    heads = "its own" if any(map(has_heads, schemes)) else ""
    itemsize = 2 if bf16_enabled(config) else 4
    recompute = bool(config.get("pipeline", {}).get("activation_checkpoint_interval"))
    candidate = Candidate(
        stages,
        replicas,
        schemes[0],
        heads,
        micro_batch,
        micro_batches,
        section.layout.stages,
        recompute,
    )
    unlimited = Cluster(
        1, stages * replicas, tflops=1, memory_gib=math.inf, link_gbps=1, intra_gbps=1
    )
    pricing = Pricing(
        Model.of(hf_config, seq_len, itemsize),
        unlimited,
        micro_batch * micro_batches * replicas,
        zero_stage(config),
        heads={"its own": section.head.model_dump(exclude_defaults=True)},
    )
    return pricing.memory(candidate, schemes)


def _nearest_name(scheme: Scheme, section: LocalParallelConfig, stages: int) -> str:
    """Of `PLANNED`, the one whose memory is nearest."""
    if stages == 1:
        return "data parallel"
    wanted = "mixed" if scheme.mix else scheme.mode
    names = [
        name
        for name, of in PLANNED.items()
        if of.get("mode", "mixed") == wanted
        and split_backward_of(name) <= section.split_backward
        and bool(of.get("run_ahead")) == bool(scheme.run_ahead)
    ]

    def alike(name: str) -> tuple[int, bool]:
        predicts = PLANNED[name].get("predict_weights", False)
        return split_backward_of(name), predicts == scheme.predict_weights

    return max(reversed(names), key=alike, default="local")  # of equals the last
