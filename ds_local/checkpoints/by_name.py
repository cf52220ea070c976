"""The state of a model in a checkpoint, tensor by tensor and by name, whatever layout saved it.

A checkpoint's files are those of its stages and replicas: layers and heads whole, the optimizer's
state by parameter (fp32 without ZeRO) or cut out of flat fp32 groups, a part on each replica (bf16,
ZeRO-1; DeepSpeed's own list of names says where each parameter lies). Files are mapped, so that a
rank reads from the disk what it asks for, and no more.

Tensors have a name (`model/names.py`) and a key: WEIGHTS as the model computes with them, MASTERS
for the fp32 copies that an optimizer steps from, else the optimizer's word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_local.checkpoints.facts import segments_of_stages
from ds_local.config.strict import SECTION
from ds_local.errors import CheckpointError, MoveError
from ds_local.model.names import head_name, lasting_name, part_of
from ds_local.outputs.checkpoint_names import (
    BF16_SHARD_FILE,
    HEAD_FILE,
    LAYER_FILE,
    SHARD_FILE,
    STAGE_FILE,
)

WEIGHTS, MASTERS = "weights", "masters"
NAMES = "ds_local_names"  # beside DeepSpeed's keys: names of the parameters of each group
NOT_SHARED = ("params", "segment", "name")  # of a parameter group: what is not a setting

Look = Callable[[str], dict[str, Any]]  # name of a file in a checkpoint -> its content


class Piece(NamedTuple):
    """A stretch of a tensor."""

    name: str
    key: str
    start: int  # number of its first element in the tensor
    values: Tensor  # 1-d


class Held(NamedTuple):
    """What one file says of one parameter."""

    name: str
    tensors: dict[str, Tensor]  # key -> 1-d, of the same length
    counters: dict[str, Any]  # steps
    settings: dict[str, Any]  # of its parameter group


class SavedState:
    """A range of layers of a checkpoint, with the heads between them.

    Args:
        look: gives the content of a file of the checkpoint, without reading its tensors.
        facts: of the checkpoint.
        trained: lasting names of the parameters that this run trains, by layer or head, in order.
        layers: of the whole model.

    Raises:
        CheckpointError: when files are not what ds_local writes.
    """

    def __init__(
        self,
        look: Look,
        facts: Mapping[str, Any],
        trained: Mapping[str, Sequence[str]],
        layers: Collection[int],
    ) -> None:
        self._look, self._facts, self._trained = look, facts, trained
        self.segment_parts: list[int] = facts["segment_parts"]
        self._segments = segments_of_stages(facts)
        self._pieces: dict[str, dict[str, list[Piece]]] = {}
        self.counters: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        for stage in range(len(self._segments)):
            if not set(layers).isdisjoint(self.layers_of(stage)):
                self._index(stage)

    def layers_of(self, stage: int) -> list[int]:
        """Of one of the checkpoint's stages, in its order."""
        return [layer for segment in self._segments[stage] for layer in self._layers(segment)]

    def _layers(self, segment: int) -> range:
        return range(*self.segment_parts[segment : segment + 2])

    def _index(self, stage: int) -> None:
        for piece in self.weights(stage):
            self._pieces.setdefault(piece.name, {})[WEIGHTS] = [piece]
        starts: dict[str, int] = {}
        for held in self.optimizer(stage):
            start = starts.get(held.name, 0)
            for key, values in held.tensors.items():
                piece = Piece(held.name, key, start, values)
                self._pieces.setdefault(held.name, {}).setdefault(key, []).append(piece)
                starts[held.name] = start + values.numel()
            self.counters.setdefault(held.name, held.counters)
            self.settings.setdefault(held.name, held.settings)

    def pieces(self) -> Iterator[Piece]:
        """All there is."""
        for by_key in self._pieces.values():
            for pieces in by_key.values():
                yield from pieces

    # --- by name ----------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def keys(self, name: str) -> list[str]:
        return list(self._pieces.get(name, ()))

    def moments(self, name: str) -> list[str]:
        """Keys of the optimizer's tensors of a parameter."""
        return [key for key in self.keys(name) if key not in (WEIGHTS, MASTERS)]

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """`count` elements of a tensor, from number `start` on: 1-d.

        Raises:
            CheckpointError: when the checkpoint does not have them all.
        """
        parts, at = [], start
        for piece in self._pieces.get(name, {}).get(key, ()):
            skipped = at - piece.start
            if 0 <= skipped < piece.values.numel() and at < start + count:
                part = piece.values[skipped : skipped + start + count - at]
                parts.append(part)
                at += part.numel()
        if at < start + count:
            raise CheckpointError(
                f"the checkpoint has {at - start} of the {count} elements from {start} on of "
                f"{name} ({key}); use another checkpoint"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def size(self, name: str, key: str) -> int:
        return sum(piece.values.numel() for piece in self._pieces.get(name, {}).get(key, ()))

    # --- file by file -----------------------------------------------------------------------------

    def weights(self, stage: int) -> Iterator[Piece]:
        """Layers and heads of a stage, whole."""
        for layer in self.layers_of(stage):
            yield from self._whole(LAYER_FILE.format(layer), str(layer))
        for segment in self._segments[stage]:
            yield from self._whole(HEAD_FILE.format(segment), head_name(self._end(segment)))

    def _end(self, segment: int) -> int:
        return self.segment_parts[segment + 1]

    def _whole(self, file: str, part: str) -> Iterator[Piece]:
        for name, tensor in self._look(file).items() if file in self._facts["files"] else ():
            if isinstance(tensor, Tensor):
                yield Piece(f"{part}.{name}", WEIGHTS, 0, tensor.detach().reshape(-1))

    def optimizer(self, stage: int) -> Iterator[Held]:
        """What the optimizer's files of a stage hold, replica by replica, so that the pieces of a
        tensor come in order."""
        shards = [self._shard(stage, replica) for replica in range(self._facts["num_replicas"])]
        files = [name for name in shards if name is not None]
        try:
            if not files:
                yield from self._by_parameter(stage)
            for name in files:
                yield from self._cut_out(name)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            where = ", ".join(files) or STAGE_FILE.format(stage)
            raise CheckpointError(
                f"{where} is not what ds_local writes: {type(error).__name__}: {error}; use "
                "another checkpoint"
            ) from error

    def _shard(self, stage: int, replica: int) -> str | None:
        names = [file.format(replica, stage) for file in (SHARD_FILE, BF16_SHARD_FILE)]
        return next((name for name in names if name in self._facts["files"]), None)

    def _by_parameter(self, stage: int) -> Iterator[Held]:
        content = self._look(STAGE_FILE.format(stage))
        saved = content["optimizer"]
        if NAMES in content:
            names = [[lasting_name(n, self.segment_parts) for n in own] for own in content[NAMES]]
        else:
            names = self._derived_names(stage, saved["param_groups"])
        for group, own in zip(saved["param_groups"], names, strict=True):
            for index, name in zip(group["params"], own, strict=True):
                size = self.size(name, WEIGHTS)
                state = saved["state"].get(index, {})
                tensors = {
                    key: value.detach().reshape(-1)
                    for key, value in state.items()
                    if key != "step" and isinstance(value, Tensor) and value.numel() == size
                }
                counters = {key: state[key] for key in state.keys() - tensors.keys()}
                if NAMES not in content and any(getattr(v, "ndim", 0) for v in counters.values()):
                    raise self._unnamed(stage)  # the shape of another parameter
                yield Held(name, tensors, counters, group)

    def _derived_names(self, stage: int, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Names of the parameters of an older checkpoint, which has their order alone: layer by
        layer, then head by head; segment by segment where each has rates of its own."""
        segments = self._segments[stage]
        heads = [self._trained_in_head(segment) for segment in segments]
        layers = [
            [name for layer in self._layers(segment) for name in self._trained.get(str(layer), ())]
            for segment in segments
        ]
        if "segment" in groups[0]:
            found = [[*names, *more] for names, more in zip(layers, heads, strict=True)]
        else:
            found = [[name for names in (*layers, *heads) for name in names]]
        if [len(names) for names in found] != [len(group["params"]) for group in groups]:
            raise self._unnamed(stage)
        return found

    @staticmethod
    def _unnamed(stage: int) -> MoveError:
        return MoveError(
            f"{STAGE_FILE.format(stage)} is of an earlier version and does not name its "
            "parameters, and this run's go by other numbers; resume it once on the layout that "
            "saved it, save there and move then, or start the optimizer afresh "
            "(load_optimizer_states=False; scripts/train.py --resume --allow-change optimizer)"
        )

    def _trained_in_head(self, segment: int) -> list[str]:
        file, cut = HEAD_FILE.format(segment), self._end(segment)
        names = self._look(file) if file in self._facts["files"] else ()
        there = [f"{head_name(cut)}.{name}" for name in names]
        own = self._trained.get(head_name(cut), ())
        if own and set(own) <= set(there):
            return list(own)
        head = self._facts[SECTION]["head"]
        others = ["frequent."] + ["readout."] * (head["readout"] == "shared")
        others += ["blocks."] * (head["blocks_from"] == "next_tracked")
        prefixes = tuple(f"{head_name(cut)}.{prefix}" for prefix in others)
        return [name for name in there if not name.startswith(prefixes)]

    def _cut_out(self, file: str) -> Iterator[Held]:
        state = self._look(file)["optimizer_state_dict"]
        base, flats = state["base_optimizer_state"], state["single_partition_of_fp32_groups"]
        places = state["param_slice_mappings"]
        for number, (flat, found) in enumerate(zip(flats, places, strict=True)):
            moments = base["state"].get(number, {})
            for name, place in found.items():
                stretch = slice(place.start, place.start + place.numel)
                tensors = {
                    key: value.detach()[stretch]
                    for key, value in moments.items()
                    if key != "step" and isinstance(value, Tensor) and value.dim() == 1
                }
                counters = {key: moments[key] for key in moments.keys() - tensors.keys()}
                tensors[MASTERS] = flat.detach()[stretch]
                lasting = lasting_name(name, self.segment_parts)
                yield Held(lasting, tensors, counters, base["param_groups"][number])


def trained_by_part(names: Sequence[str]) -> dict[str, list[str]]:
    """Lasting names in their order, by layer or head."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return found


# --- checksums ------------------------------------------------------------------------------------

_CHUNK = 1 << 18  # elements at a time, so that no large tensor is copied
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x5851F42D4C957F2D  # of Knuth's 64-bit generator


def checksum(values: Tensor, start: int = 0) -> int:
    """Of the bits of a stretch of a tensor; sums of stretches add up, modulo 2^64, to that of the
    whole, however it was cut. Each element counts by its place, so what moved counts otherwise.

    Args:
        values: 1-d.
        start: number of the first element in the tensor.
    """
    total = 0
    for at in range(0, values.numel(), _CHUNK):
        part = values.detach()[at : at + _CHUNK].cpu().contiguous()
        bits = part.view(_BITS[part.element_size()]).long()
        place = torch.arange(start + at + 1, start + at + 1 + len(bits)) * _ODD
        place = (place ^ (place >> 29)) | 1
        total += int((bits * place).sum())
    return total % 2**64
