"""The replicas of a stage talk among themselves: tensors on their way, averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ds_local.errors import LostConnection
from ds_local.links.device import to_device, to_host
from ds_local.links.groups import HostGroup
from ds_local.links.waiting import Waiter, is_lost
from ds_local.replicas.engine import Engine


class Parcels:
    """Tensors on their way between the replicas of a stage."""

    def __init__(self, group: ReplicaGroup, sent: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self._group = group
        self._received = [torch.empty(size, dtype=sent[0].dtype) for size in sizes]
        self._received[group.index] = sent[group.index]
        self._sent = [tensor.contiguous() for tensor in sent]  # alive until they have gone
        self._works: list[tuple[int, Any]] = []
        for other in group.others:
            if sizes[other]:
                self._works.append((other, group.receive(other, self._received[other])))
        for other in group.others:
            if self._sent[other].numel():
                self._works.append((other, group.send(other, self._sent[other])))
                group.num_bytes += self._sent[other].nbytes

    def wait(self) -> list[Tensor]:
        """What each replica sent. Raises LostConnection naming the replica that is gone or late."""
        for other, work in self._works:
            self._group.wait(other, work)
        return self._received


class ReplicaGroup(Waiter):
    """The replicas of one stage. Each talks to each directly, so whoever is missing is named. Bytes
    travel over gloo.

    Args:
        stage: for messages.
        ranks: global ranks of the replicas.
        group: of these ranks.
        timeout_seconds: longest wait for another replica.
    """

    def __init__(
        self, stage: int, ranks: Sequence[int], group: HostGroup, timeout_seconds: float
    ) -> None:
        super().__init__(timeout_seconds)
        self.stage, self.ranks = stage, list(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(dist.get_rank())
        self.others = [replica for replica in range(self.size) if replica != self.index]
        self.num_bytes = 0  # sent to others
        self._group, self._tag = group, group.take_tags()

    def exchange(self, sent: Sequence[Tensor], sizes: Sequence[int]) -> Parcels:
        """Start sending `sent[r]` (one dimension, on the CPU) to each replica r, which sends
        `sizes[r]` elements back."""
        return Parcels(self, sent, sizes)

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over the replicas, with the same bits on all of them: each replica adds up one
        share, in replica order.

        Sends 2 (R - 1) / R times the tensors' bytes, as the best all-reduce does.
        """
        if not tensors:
            return []
        flat = to_host(tensors)
        size = -(-flat.numel() // self.size)
        shares = F.pad(flat, (0, size * self.size - flat.numel())).split(size)
        received = self.exchange(shares, [size] * self.size).wait()
        total = received[0].clone()
        for share in received[1:]:
            total += share
        means = self.exchange([total / self.size] * self.size, [size] * self.size).wait()
        pieces = torch.cat(means)[: flat.numel()].split([tensor.numel() for tensor in tensors])
        return [
            to_device(piece.view_as(tensor), tensor.device)
            for piece, tensor in zip(pieces, tensors, strict=True)
        ]

    def send(self, other: int, buffer: Tensor) -> Any:
        return self._start(self._group.send, other, buffer)

    def receive(self, other: int, buffer: Tensor) -> Any:
        return self._start(self._group.receive, other, buffer)

    def _start(self, operation: Callable[..., Any], other: int, buffer: Tensor) -> Any:
        try:
            return operation(buffer, self.ranks[other], self._tag)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise LostConnection(f"cannot reach {self._name(other)}") from error

    def wait(self, other: int, work: Any) -> None:
        purpose = "at the exchange between replicas"
        self.wait_for(work, self.ranks[other], self._name(other), purpose)

    def _name(self, other: int) -> str:
        return f"replica {other} of stage {self.stage} (rank {self.ranks[other]})"


def replica_group(engine: Engine) -> ReplicaGroup:
    """The group of this rank's stage. A call of all its replicas."""
    stage = engine.stage_id
    ranks = [engine.rank_of(stage, replica) for replica in range(engine.dp_world_size)]
    return ReplicaGroup(stage, ranks, engine.groups.of(ranks), engine.section.link.timeout_seconds)
