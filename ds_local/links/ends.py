"""What both ends of a link between two stages have in common."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from ds_local.errors import LostConnection
from ds_local.links.buffers import HEADER, SPEC_BYTES, Form
from ds_local.links.groups import HostGroup
from ds_local.links.staging import Direct, Staging
from ds_local.links.waiting import Waiter, is_lost

MESSAGE, FAILED, FORM = 1, 2, 3  # codes of messages
LEAST_ROOM = HEADER * 8 + SPEC_BYTES  # of a buffer: any text fits
RINGS = 128  # more than a link can ever need: tags from one link of a group to the next


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a link, for error messages."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


class GroupEnd(Waiter):
    """What both ends of a link between two stages share.

    Args:
        name: what the link carries, for messages.
        group: of the two ranks.
        peer: the other end.
        depth: messages under way before the sender waits; receives posted ahead.
        timeout_seconds: longest wait.
        staging: the way between host buffers and the device that the tensors are on.
        direct: the way past the host, if tensors on the device take it.
        first_tag: `RINGS` tags of the group from here on are the link's own.
    """

    def __init__(
        self,
        name: str,
        group: HostGroup,
        peer: Peer,
        depth: int,
        timeout_seconds: float,
        staging: Staging,
        direct: Direct | None = None,
        first_tag: int = 0,
    ) -> None:
        super().__init__(timeout_seconds)
        self.name = name
        self.peer = peer
        self.depth = depth
        self.num_bytes = 0  # through this end, headers included
        self._group = group
        self._tag = first_tag  # of the ring
        self._room = LEAST_ROOM  # of its buffers; the first ring takes one text
        self._form: Form | None = None  # of the newest message
        self._staging = staging
        self._direct = direct
        self._under_way: deque[tuple[Any, Any]] = (
            deque()
        )  # (work, what must stay alive until it is done)

    @property
    def message_bytes(self) -> int:
        """Size of the newest message, 0 before the first."""
        return self._form.num_bytes if self._form else 0

    def _wait(self, work: Any, purpose: str) -> None:
        self.wait_for(work, self.peer.rank, str(self.peer), f"{purpose} on the {self.name}")

    def _unreachable(self, error: RuntimeError) -> RuntimeError:
        """What an operation that could not be started means."""
        if not is_lost(error):
            return error
        return LostConnection(f"cannot reach {self.peer} on the {self.name}")
