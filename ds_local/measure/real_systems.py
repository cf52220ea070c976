"""The pipelines that train a real model beside ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.config.catalog import SCHEMES, fewest_micro_batches, section_of
from ds_local.config.files import local_parallel
from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches
from ds_local.model.flops import choose_parts

RANKS = 2

SEED = 1234

EVAL_SEQUENCES = 64

CHEAP_HEAD = {"token_fraction": 0.125}  # a loss for one position in eight


@dataclass(frozen=True)
class Job:
    """What every system is given."""

    model: dict[str, Any]
    data: str | None  # a prepared folder; None: random tokens
    tokens: int  # in a sequence
    sequences: int  # in a micro-batch
    micro_batches: int

    def batches(
        self, sequences: int, micro_batches: int, replicas: int = 1, replica: int = 0
    ) -> Iterator[Any]:
        """Micro-batches (ids, labels) for ever."""
        shape = BatchShape(sequences, micro_batches, replicas, replica)
        if self.data is not None:
            return training_batches(TokenData(self.data), SEED, 0, shape)
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(self.model["vocab_size"], (sequences, self.tokens), generator=generator)
        return itertools.repeat((ids, ids))

    def validation(self) -> Sequence[Any]:
        if self.data is None:
            return [next(self.batches(self.sequences, 1))]
        return validation_batches(
            TokenData(self.data), BatchShape(self.sequences, 1, 1, 0), EVAL_SEQUENCES
        )


Built = tuple[Callable[[], Any], Callable[[], float]]  # take a step; validation loss


def ds_local(job: Job, scheme: dict[str, Any]) -> Built:
    import ds_local as package

    config = config_of(job) | {"local_parallel": scheme}
    module = package.causal_lm(job.model, RANKS, config, job.tokens)
    engine = package.initialize(model=module, config=config)[0]
    data = job.batches(job.sequences, job.micro_batches)

    def evaluate() -> float:
        batches = job.validation()
        return engine.eval_batch(iter(batches), num_micro_batches=len(batches)).item()

    return lambda: engine.train_batch(data), evaluate


def deepspeed(job: Job) -> Built:
    """DeepSpeed's PipelineEngine on the same layers, cut where all stages carry the same work."""
    import deepspeed as package
    from deepspeed.pipe import PipelineModule

    from ds_local.model import families, heads

    hf_config = families.load_model_config(job.model)
    section = local_parallel({"local_parallel": {"mode": "backprop"}})
    parts = choose_parts(hf_config, section, RANKS, job.micro_batches, job.tokens)

    class Balanced(PipelineModule):
        def _partition_layers(self, method: str = "uniform") -> None:
            self.parts = parts
            self._set_bounds(parts[self.stage_id], parts[self.stage_id + 1])

    module = Balanced(_layers(job.model), num_stages=RANKS, loss_fn=heads.lm_loss)
    engine = package.initialize(model=module, config=config_of(job))[0]
    data = job.batches(job.sequences, job.micro_batches)

    def evaluate() -> float:
        batches = job.validation()
        return engine.eval_batch(iter(batches), num_micro_batches=len(batches)).item()

    return lambda: engine.train_batch(data), evaluate


class _Whole(nn.Module):
    """The model in one piece: (ids, labels) -> loss."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layers(model))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in itertools.islice(self.layers, len(self.layers) - 1):
            x = layer(x)
        return self.layers[-1].loss(x, labels)  # type: ignore[operator]


def data_parallel(job: Job) -> Built:
    """The whole model on each rank, gradients averaged by torch's DistributedDataParallel: the same
    sequences a step."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    whole = _Whole(job.model)
    replica = DistributedDataParallel(whole)
    optimizer = torch.optim.AdamW(whole.parameters(), **OPTIMIZER)
    # a step's sequences are dealt to the replicas; a single micro-batch is halved
    halves = job.micro_batches == 1
    micro_batches = 1 if halves else job.micro_batches // RANKS
    sequences = job.sequences // RANKS if halves else job.sequences
    data = job.batches(sequences, micro_batches, RANKS, dist.get_rank())

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(micro_batches - 1):
            with replica.no_sync():
                (replica(*next(data)) / micro_batches).backward()
        (replica(*next(data)) / micro_batches).backward()
        optimizer.step()

    def evaluate() -> float:
        with torch.no_grad():
            losses = [whole(*batch).item() for batch in job.validation()]
        return sum(losses) / len(losses)

    return step, evaluate


OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def config_of(job: Job) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": job.sequences,
        "gradient_accumulation_steps": job.micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "AdamW", "params": OPTIMIZER | {"torch_adam": True}},
    }


def _layers(model: dict[str, Any]) -> list[nn.Module]:
    from ds_local.model import blocks, families

    config = families.load_model_config(model)
    middle = [blocks.Block(config, index, SEED) for index in range(families.num_blocks(config))]
    return [blocks.Embedding(config, SEED), *middle, blocks.Readout(config, SEED)]


def _ours(scheme: str, **more: Any) -> tuple[int, Callable[[Job], Built]]:
    """A scheme by its name in the table of schemes."""
    section = SCHEMES[scheme].section
    return fewest_micro_batches(section), lambda job: ds_local(
        job, section_of(section, job.micro_batches) | more
    )


# (owner, name) -> fewest micro-batches, builder
SYSTEMS: dict[tuple[str, str], tuple[int, Callable[[Job], Built]]] = {
    ("ds_local", "local"): _ours("local", head=CHEAP_HEAD),
    ("ds_local", "mixed 1/4"): _ours("mixed 1/4", head=CHEAP_HEAD),
    ("ds_local", "backprop"): _ours("backprop"),
    ("ds_local", "backprop, split 2"): _ours("backprop, split 2"),
    ("deepspeed", "1F1B"): (1, deepspeed),
    ("torch", "data parallel"): (1, data_parallel),
}
