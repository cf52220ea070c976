"""Read-only copies of other segments' weights in auxiliary heads: a shared readout, tracked blocks.

The source sends its weights every `refresh_every` optimizer steps; the target puts them in place a
fixed number of steps later. That delay covers how far the target may have run ahead, so nobody
waits, and it depends on the model's segments alone: every machine, fast or slow, and every number
of ranks uses the same copy in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_local.config.schema import LocalParallelConfig
from ds_local.errors import CheckpointError
from ds_local.links.buffers import Tag
from ds_local.links.device import to_device
from ds_local.links.pair import Receiver, Sender
from ds_local.links.transport import End, MemoryLink

FileOf = Callable[[int], str | None]  # segment -> name of its file in a checkpoint


class Copy(NamedTuple):
    """What the head of segment `target` copies from segment `source`."""

    kind: str  # "readout" or "blocks"
    source: int
    target: int

    def __str__(self) -> str:
        return f"{self.kind} copy {self.source} -> {self.target}"


def planned_copies(
    section: LocalParallelConfig, num_segments: int, head_segments: set[int]
) -> list[Copy]:
    """All copies that a model's heads need, in the same order on every rank."""
    copies = []
    for target in sorted(head_segments):
        if section.head.readout == "shared":
            copies.append(Copy("readout", num_segments - 1, target))
        if section.head.blocks_from == "next_tracked" and section.head.blocks_of(target, 1):
            copies.append(Copy("blocks", target + 1, target))
    return copies


def refresh_delay(num_segments: int, num_micro_batches: int, link_depth: int) -> int:
    """Steps between sending and use: more than the first segment can be ahead of the last one. A
    link holds up to `link_depth` messages at either end."""
    return 1 + math.ceil((num_segments - 1) * 2 * link_depth / num_micro_batches)


def copies_file(segment: int, replica: int) -> str:
    """Name of the checkpoint file with the weights that are on their way to a segment's head."""
    return f"copies_{segment:02d}-replica_{replica:02d}-model_states.pt"


class Copies:
    """This rank's ends of all copies.

    Args:
        plan: all copies of the model.
        tensors_of: (copy, "source" or "target") -> the weights at that end, in the same order at
            both.
        make_link: (name, source segment, target segment, depth) -> this rank's end; a collective
            call.
        every: steps between refreshes.
        delay: steps from sending to use.
        tracking: share of the old value in the moving average of blocks.
    """

    def __init__(
        self,
        plan: Sequence[Copy],
        tensors_of: Callable[[Copy, str], list[Tensor]],
        make_link: Callable[[str, int, int, int], End | None],
        every: int,
        delay: int,
        tracking: float,
    ) -> None:
        self.every, self.delay, self.tracking = every, delay, tracking
        self._tensors_of = tensors_of
        depth = delay // every + 1  # all that is under way between ranks at the same step
        ends = {copy: make_link(str(copy), copy.source, copy.target, depth) for copy in plan}
        self._out = {
            copy: end for copy, end in ends.items() if isinstance(end, Sender | MemoryLink)
        }
        self._in = {
            copy: end for copy, end in ends.items() if isinstance(end, Receiver | MemoryLink)
        }
        self._first_step = 0  # nothing is under way from steps up to this one but what is pending
        self._pending: dict[tuple[Copy, int], list[Tensor]] = {}

    def send(self, step: int) -> None:
        """After `step` optimizer steps: send what is due."""
        if step % self.every == 0:
            for copy, link in self._out.items():
                tensors = self._tensors_of(copy, "source")
                link.send(
                    Tag(step, 0),
                    {str(i): tensor.detach().clone() for i, tensor in enumerate(tensors)},
                )

    def take(self, step: int) -> None:
        """Before optimizer step `step`: put in place what is due.

        Raises:
            TransportError: when the source is gone or silent.
        """
        due = step - self.delay
        if due % self.every or due <= 0:
            return
        for copy in self._in:
            weights = self._arrived(copy, due)
            keep = self.tracking if copy.kind == "blocks" else 0.0
            with torch.no_grad():
                for tensor, new in zip(
                    self._tensors_of(copy, "target"), weights, strict=bool(weights)
                ):
                    new = to_device(new, tensor.device)  # one of a checkpoint is on the host
                    tensor.copy_(
                        tensor.float().mul_(keep).add_(new.float(), alpha=1 - keep) if keep else new
                    )

    def _arrived(self, copy: Copy, due: int) -> list[Tensor]:
        """The weights sent after `due` steps; none where there are none to be had."""
        if (copy, due) not in self._pending:
            if due <= self._first_step:
                return []  # taken, or sent before this run began and not kept
            return list(self._in[copy].receive(Tag(due, 0))[1].values())
        return self._pending.pop((copy, due))

    # --- checkpoints ------------------------------------------------------------------------------

    def collect(self, step: int) -> None:
        """Receive all that has been sent in the first `step` steps, to be put in place in its
        time."""
        for copy in self._in:
            for due in range(step - self.delay, step + 1):
                if due > 0 and due % self.every == 0:
                    self._pending[copy, due] = self._arrived(copy, due)

    def save(
        self, write: Callable[[Any, str], None], folder: str | Path, step: int, replica: int
    ) -> None:
        """Keep what is on its way after `step` steps, in a file for each target. Loses nothing that
        has been sent."""
        self.collect(step)
        states: dict[int, dict[str, Tensor]] = {}
        for (copy, due), tensors in self._pending.items():
            states.setdefault(copy.target, {}).update(
                {f"{copy.kind}.{due}.{i}": tensor for i, tensor in enumerate(tensors)}
            )
        for target, state in states.items():
            write(state, str(Path(folder, copies_file(target, replica))))

    def check(self, look: Callable[[str], dict[str, Any]], file_of: FileOf) -> None:
        """Compare the files that `load` would read with what they go to.

        Args:
            look: gives the content of a file of the checkpoint.
            file_of: gives the name of the file for the head of a segment of this run.

        Raises:
            CheckpointError: when one is not what `save` writes.
        """
        for copy in self._in:
            wanted = [tensor.shape for tensor in self._tensors_of(copy, "target")]
            name = file_of(copy.target)
            for due, tensors in self._saved(look, name, copy).items():
                shapes = [getattr(tensor, "shape", None) for tensor in tensors]
                if not due.isdigit() or shapes != wanted:
                    raise CheckpointError(
                        f"{name} is not what the head of segment {copy.target} copies; use another "
                        "checkpoint"
                    )

    def load(self, look: Callable[[str], dict[str, Any]], file_of: FileOf, step: int) -> None:
        """Go on after `step` steps with what was on its way in a checkpoint, if any."""
        self._first_step = step
        self._pending = {
            (copy, int(due)): tensors
            for copy in self._in
            for due, tensors in self._saved(look, file_of(copy.target), copy).items()
        }

    @staticmethod
    def _saved(
        look: Callable[[str], dict[str, Any]], name: str | None, copy: Copy
    ) -> dict[str, list[Tensor]]:
        """Step -> weights that a file has of a copy."""
        found: dict[str, list[Tensor]] = {}
        for key, tensor in (look(name) if name is not None else {}).items():
            kind, _, rest = str(key).partition(".")
            if kind == copy.kind:
                found.setdefault(rest.partition(".")[0], []).append(tensor)
        return found
