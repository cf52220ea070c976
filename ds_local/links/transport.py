"""One-way links between neighbouring segments.

A message is a dict of named tensors with a tag (step, micro-batch). Segments of one stage hand over
in memory; stages talk over a group of two ranks, one for all links between them (`pair`).
Everything that waits has a limit and names whom it waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.buffers import Message, Tag
from ds_local.links.ends import RINGS, Peer
from ds_local.links.groups import Groups
from ds_local.links.lasting_receiver import LastingReceiver
from ds_local.links.lasting_sender import LastingSender
from ds_local.links.pair import Receiver, Sender
from ds_local.links.staging import Direct, Staging


class MemoryLink:
    """Between two segments of the same stage: both ends in one object, nothing waits.

    Tensors are copied, as between stages: what the upper segment does to one in place, the lower
    segment and its head never see.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self.num_bytes = 0
        self._queue: deque[tuple[Tag, Message]] = deque()

    def send(self, tag: Tag, tensors: Message) -> None:
        self._queue.append((tag, {name: _copy_of(tensor) for name, tensor in tensors.items()}))

    def receive(self, tag: Tag) -> tuple[Tag, Message]:
        for position, (found, tensors) in enumerate(self._queue):
            if found[:2] == tag[:2]:
                del self._queue[position]
                return found, tensors
        raise TransportError(f"no message for {tag} within the stage")

    def flush(self) -> None:
        """Nothing is ever under way."""

    def fail(self, reason: str) -> None:
        """The other end is this very stage."""


def _copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


End = MemoryLink | Sender | Receiver | LastingSender | LastingReceiver


def make_end(
    name: str,
    stage: int,
    source: int,
    target: int,
    ranks: Sequence[Sequence[int] | Mapping[int, int]],
    depth: int,
    timeout_seconds: float,
    device: torch.device,
    groups: Groups,
    past_host: bool = False,
) -> End | None:
    """This rank's end of a link from stage `source` to stage `target`, None when it has none. A
    call of both ends, with `past_host` of all ranks.

    Args:
        stage: this rank's stage.
        ranks: for each replica the global rank of each stage.
        groups: the owner's; all its links are made in the same order on every rank.
        past_host: tensors on the device do not go through host memory.
    """
    if source == target:
        return MemoryLink() if stage == source else None
    mine: End | None = None
    for replica in ranks:
        pair = [replica[source], replica[target]]
        beside = dist.new_group(pair, backend=Direct.backend(device)) if past_host else None
        if dist.get_rank() in pair:
            is_source = dist.get_rank() == pair[0]
            peer = Peer(target, pair[1]) if is_source else Peer(source, pair[0])
            direct = Direct(device, beside, peer.rank) if past_host else None
            if direct is not None:
                direct.connect(is_source)
            group = groups.pair(peer.rank)
            mine = (Sender if is_source else Receiver)(
                name,
                group,
                peer,
                depth,
                timeout_seconds,
                Staging(device),
                direct,
                group.take_tags(RINGS),
            )
    return mine
