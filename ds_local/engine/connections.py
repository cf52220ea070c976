"""What a rank is connected with: its groups, and its ends of the links between segments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ds_local.config.sections import LinkConfig
from ds_local.links.groups import Groups, in_turn
from ds_local.links.transport import End, make_end
from ds_local.schedules.schedule import Link


class Connections:
    """Of one rank of an engine. Making them connects it with the stages next to its own.

    Args:
        stage_of: segment -> stage.
        stage, replica: of this rank.
        ranks: for each replica the global rank of each stage.
        device: that the tensors of messages are on.
        section: "local_parallel.link".
    """

    def __init__(
        self,
        stage_of: Sequence[int],
        stage: int,
        replica: int,
        ranks: Sequence[Sequence[int]],
        device: torch.device,
        section: LinkConfig,
    ) -> None:
        self.groups = Groups()
        self.ends: dict[str, End | None] = {}  # name of each link of the model -> this rank's end
        self._stage_of, self._stage, self._ranks = stage_of, stage, ranks
        self._device, self._section = device, section
        for edge in in_turn(list(pairwise(stage_of))):
            if stage in edge:
                self.groups.pair(ranks[replica][sum(edge) - stage])

    @property
    def own(self) -> list[End]:
        """The ends that this rank has."""
        return [end for end in self.ends.values() if end is not None]

    def make_link(self, link: Link) -> End | None:
        """This rank's end of a link of the schedules, if it has one. All ranks make the same links
        in the same order."""
        up = link.kind == "activation"
        source, target = (link.lower, link.lower + 1) if up else (link.lower + 1, link.lower)
        return self.make_end(str(link), source, target, self._section.depth)

    def make_end(self, name: str, source: int, target: int, depth: int) -> End | None:
        """The same for a link between any two segments."""
        self.ends[name] = make_end(
            name,
            self._stage,
            self._stage_of[source],
            self._stage_of[target],
            self._ranks,
            depth,
            self._section.timeout_seconds,
            self._device,
            self.groups,
            self._section.past_host,
        )
        return self.ends[name]
