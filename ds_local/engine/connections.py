"""What a rank is connected with: its groups, and its ends of the links between segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        ranks: for each replica the global rank of each stage of this job.
        here: these stages; default all.
        device: that the tensors of messages are on.
        section: "local_parallel.link".
        outside: makes an end of a link to a stage of another job, given the link's name and both
            stages.
    """

    def __init__(
        self,
        stage_of: Sequence[int],
        stage: int,
        replica: int,
        ranks: Sequence[Sequence[int]],
        device: torch.device,
        section: LinkConfig,
        here: range | None = None,
        outside: Callable[[str, int, int], End] | None = None,
    ) -> None:
        self.groups = Groups()
        self.ends: dict[str, End | None] = {}  # name of each link of the model -> this rank's end
        stages = range(len(ranks[0])) if here is None else here
        self._stage_of, self._stage = stage_of, stage
        self._ranks = [dict(zip(stages, chain, strict=True)) for chain in ranks]
        self._device, self._section, self._outside = device, section, outside
        for edge in in_turn(list(pairwise(stage_of))):
            other = sum(edge) - stage
            if stage in edge and other in stages:
                self.groups.pair(self._ranks[replica][other])

    @property
    def own(self) -> list[End]:
        """The ends that this rank has."""
        return [end for end in self.ends.values() if end is not None]

    def make_link(self, link: Link) -> End | None:
        """This rank's end of a link of the schedules, if it has one. All ranks make the same links
        in the same order."""
        up = link.kind == "activation"
        source, target = (link.lower, link.lower + 1) if up else (link.lower + 1, link.lower)
        depth, past_host = self._section.depth, self._section.past_host
        return self.make_end(str(link), source, target, depth, past_host)

    def make_end(
        self, name: str, source: int, target: int, depth: int, past_host: bool = False
    ) -> End | None:
        """The same for a link between any two segments. One whose messages are taken much later
        than they are sent goes through the host: past it, their kernels would wait on the
        device."""
        ends = self._stage_of[source], self._stage_of[target]
        if self._outside is not None and not self._ranks[0].keys() >= set(ends):
            self.ends[name] = self._outside(name, *ends) if self._stage in ends else None
            return self.ends[name]
        self.ends[name] = make_end(
            name,
            self._stage,
            *ends,
            self._ranks,
            depth,
            self._section.wait_seconds,
            self._device,
            self.groups,
            past_host,
        )
        return self.ends[name]
