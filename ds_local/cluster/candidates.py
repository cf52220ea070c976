"""What the planner chooses among: schemes and heads to run, the cluster, the model, one candidate.

No processes, no devices. Times in seconds, sizes in bytes unless a name says otherwise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ds_local.config.catalog import SCHEMES, Section, head_of
from ds_local.config.sections import HeadConfig
from ds_local.errors import ConfigError, counted
from ds_local.model import families
from ds_local.model.flops import UnitCosts, unit_times

GIB = 2**30

# What a layout may run; where `pricing.expected_memory` finds several alike, it takes the last.
PLANNED = {
    name: SCHEMES[name].section
    for name in (
        "data parallel",  # one stage
        "backprop",
        "backprop, split 1",
        "backprop, split 2",
        "backprop, run ahead",
        "backprop, run ahead, predicted",
        "interlocking 2",
        "overlapping 2",
        "chunked 2",
        "chunked 2, split 2",
        "chunked 2, run ahead",
        "mixed 1/2",
        "mixed 1/4",
        "local",
    )
}
# options of "head", see `catalog.head_of`
HEADS: dict[str, Section] = {
    "full": {},
    "shared": {"readout": "shared", "temperature": True},
    "shared, 1/4 of tokens": {"readout": "shared", "token_fraction": 0.25},
    "rank 128, 1/4 of tokens": {"rank": 128, "token_fraction": 0.25},
    "1/8 of the tokens": {"token_fraction": 0.125},
    "1/8 of the vocabulary": {"vocabulary": 1 / 8},
}


class Tail(NamedTuple):
    """A run that ends in another scheme than it begins with."""

    first: str
    end: str
    share: float  # of the run's steps, those at the end


TAILS = {
    "chunked 2, split 2, tail 40 %": Tail("chunked 2, split 2", "backprop, split 2", 0.4),
    "local, tail 40 %": Tail("local", "backprop, split 2", 0.4),
}

# those that run ahead must be asked for: in large steps older gradients taught next to nothing
DEFAULT_SCHEMES = [*(scheme for scheme in PLANNED if not PLANNED[scheme].get("run_ahead")), *TAILS]


def parts_of(scheme: str) -> list[tuple[float, str]]:
    """(share of a run's steps, scheme of `PLANNED`) of its parts, in their order."""
    if scheme not in TAILS:
        return [(1.0, scheme)]
    first, end, share = TAILS[scheme]
    return [(1 - share, first), (share, end)]


def split_backward_of(scheme: str) -> int:
    return PLANNED[scheme].get("split_backward", 0)


def has_heads(scheme: str) -> bool:
    return any(PLANNED[part].get("mode") != "backprop" for _, part in parts_of(scheme))


def head_config(options: Section, vocab_size: int) -> HeadConfig:
    """One of `HEADS`, of a model with so many tokens."""
    return HeadConfig(**head_of(options, vocab_size))


@dataclass(frozen=True)
class Cluster:
    """What the layout runs on."""

    nodes: int
    devices_per_node: int
    # sustained in matrix products of training, per device: peak times the share that is reached
    tflops: float
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

    @property
    def ratio(self) -> float:
        """Vocabulary / width: what a head costs beside a block."""
        return self.readout_params / self.hidden**2

    @classmethod
    def of(cls, config: Any, seq_len: int | None = None, itemsize: int = 2) -> Model:
        """From a Hugging Face config."""
        model, depth = families.skeleton(config), families.num_blocks(config)
        block = model.get_submodule(f"{families.family_of(config).blocks}.0")
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
            seq_len or families.num_positions(config),
            None,
            config,
            size,
            everything - depth * size - readout,
            readout,
            kept,
            itemsize,
        )


@dataclass(frozen=True)
class Candidate:
    """One way to use the cluster."""

    stages: int
    replicas: int
    scheme: str  # a key of PLANNED or TAILS
    heads: str  # a key of HEADS, "" where the scheme has none
    micro_batch: int  # sequences
    micro_batches: int  # per step
    placement: str = (
        "across_nodes"  # where the stages of one replica lie, as `layout.stages` of the config
    )
    recompute: bool = False  # activation checkpointing, every block

    def __str__(self) -> str:
        where = (
            "" if self.stages == 1 or self.replicas == 1 else f" {self.placement.replace('_', ' ')}"
        )
        heads = f" ({self.heads} heads)" if self.heads else ""
        return (
            f"{self.scheme}{heads}: {counted(self.stages, 'stage')}{where} x "
            f"{counted(self.replicas, 'replica')}, "
            f"{self.micro_batches} x {self.micro_batch} "
            f"sequences{', recomputing' if self.recompute else ''}"
        )


def measured_model(model: Model, profile: str | Path, seq_len: int | None = None) -> Model:
    """The model with times that a run has measured, in place of those that follow from
    floating-point operations, and with the run's length of a sequence.

    Args:
        profile: profile.json of a run.
        seq_len: the user's; needed where the profile, an older one, does not hold it.

    Raises:
        ConfigError: when it is missing, holds something else, or is of other sequences or another
            number of blocks.
    """
    units = unit_times(profile)
    try:
        facts = json.loads(Path(profile).read_text())
        layout = facts["layout"]
        sequences, depth = layout["sequences"], layout["segment_parts"][-1] - 2
        update = sum(facts["measured"]["update_seconds"]) / sum(facts["measured"]["parameters"])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{profile} lacks what this version writes, profile the run again: {error}"
        ) from error
    if depth != model.depth:
        raise ConfigError(
            f"{profile} is of a model of {depth} blocks, but --model has {model.depth}; give the "
            "profiled run's model, or profile a run of this one"
        )
    seq_len = _length(profile, layout.get("seq_len"), seq_len)
    heads = [head / sequences for head in units.heads]
    costs = UnitCosts(units.block / sequences, units.readout / sequences, heads)
    return replace(model, costs=costs, update_seconds=update, seq_len=seq_len)


def _length(profile: str | Path, measured: int | None, given: int | None) -> int:
    """Tokens in a sequence of the profiled run."""
    length = measured or given
    if length is None:
        raise ConfigError(
            f"{profile} is of an older version and does not say how long its sequences are; give "
            "the seq_len of that run's data as --seq-len"
        )
    if given not in (None, length):
        raise ConfigError(
            f"--seq-len is {given}, but {profile} was measured with sequences of {length}; leave "
            f"--seq-len out, or profile a run with sequences of {given}"
        )
    return length
