"""Leaving the training loop together, without a collective: every rank after the same step."""

from __future__ import annotations

from typing import Any

from torch import distributed as dist

from ds_local.links.notices import post_notice, read_notice


class Stopping:
    """One rank's part in agreeing on the last step.

    Rank 0 decides, stage 0 reads it, activations carry it onward. Rank 0 names the first step that
    no other rank of stage 0 can have begun: the next one, since replicas average their gradients
    at the end of every step, or that after the next exchange of replicas that train apart.
    """

    def __init__(self, stage_id: int, rank: int) -> None:
        self.stage_id, self.rank = stage_id, rank
        self.requested = (
            False  # set by `LocalPipelineEngine.request_stop`, also in a signal handler
        )

    def is_last(self, step: int, replicas: Any) -> bool:
        """Does the run end after this step? Known on stage 0; others learn it from activations."""
        if self.requested and self.rank != 0:
            post_notice("stop_requested", "yes")
        if self.stage_id != 0:
            return False
        last = read_notice("stop_after")
        if last is None and self.rank == 0 and (self.requested or read_notice("stop_requested")):
            alone = dist.get_world_size() == 1
            last = str(step if alone else replicas.next_meeting(step))
            post_notice("stop_after", last)
        return last is not None and step >= int(last)
