"""A checkpoint's optimizer state in another layout: taken over by the names of parameters, and
compared with the checkpoint before training goes on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_local.checkpoints.by_name import (
    MASTERS,
    NOT_SHARED,
    WEIGHTS,
    Look,
    SavedState,
    checksum,
    trained_by_part,
)
from ds_local.engine.deepspeed_seam import Share, shares_of
from ds_local.engine.updates import StageUpdates
from ds_local.errors import CheckpointError, MoveError
from ds_local.links.agreement import gather
from ds_local.links.device import to_device
from ds_local.model.names import is_head, lasting_name, part_of

AFRESH = (
    "start the optimizer afresh: load_optimizer_states=False (scripts/train.py --resume "
    "--allow-change optimizer)"
)
Sums = dict[tuple[str, str], int]  # (name, key) -> checksum


class Move:
    """What this rank takes over from a checkpoint of another layout. Making one reads no tensors
    and changes nothing.

    Args:
        look: gives the content of a file of the checkpoint, without reading its tensors.
        facts: of the checkpoint.
        trained: `trained_names` of the engine.
        afresh: local segments whose heads the checkpoint does not have.

    Raises:
        CheckpointError: when files are not what ds_local writes.
    """

    def __init__(
        self,
        engine: StageUpdates,
        look: Look,
        facts: Mapping[str, Any],
        trained: Mapping[str, Sequence[str]],
        afresh: Collection[int],
    ) -> None:
        self.engine = engine
        self.in_bf16 = engine.bfloat16_enabled()
        self.flat = engine.zero_optimization() or engine.using_bf16_optimizer
        parts = engine.module.segment_parts
        self._afresh = tuple(f"heads.{segment}." for segment in afresh)
        self.names: dict[Tensor, str] = {
            parameter: lasting_name(name, parts)
            for name, parameter in engine.module.named_parameters()
            if not name.startswith(self._afresh)
        }
        self.trained = trained
        self._source = look, facts, self.trained
        self.saved = SavedState(*self._source, engine.module.layer_numbers)

    def _groups(self) -> list[list[Share]]:
        """What goes on from the checkpoint, by parameter group."""
        return [
            [share for share in group if share.parameter in self.names]
            for group in shares_of(self.engine.optimizer)
        ]

    # --- before anything changes ------------------------------------------------------------------

    def check(self) -> None:
        """Raises MoveError when something is missing, or does not go together."""
        whole_shape = self.engine.replicas.whole_shape
        for group in self._groups():
            settings: dict[str, Any] = {}
            for share in group:
                name = self.names[share.parameter]
                self._check_sizes(name, whole_shape(share.parameter).numel())
                own = _settings(self.saved.settings.get(name, {}))
                for key, value in own.items():
                    if settings.setdefault(key, value) != value:
                        raise MoveError(
                            f"{name} was trained with {key} {value}, others of its parameter group "
                            f"with {settings[key]}; keep the groups, or {AFRESH}"
                        )

    def _check_sizes(self, name: str, size: int) -> None:
        if name not in self.saved.settings:
            raise MoveError(
                f"the checkpoint's optimizer did not train {name}; train the same parameters, or "
                f"{AFRESH}"
            )
        for key in self.saved.keys(name):
            if self.saved.size(name, key) != size:
                raise MoveError(
                    f"the checkpoint has {self.saved.size(name, key)} elements of {name} ({key}), "
                    f"this run {size}; give the same model"
                )
        for key, value in self.saved.counters[name].items():
            if self.flat and not _is_number(value):
                raise MoveError(
                    f"{key} of {name} has the shape of no parameter, so it cannot go into the "
                    f"shards of bf16 or ZeRO-1; keep the precision and ZeRO stage, or {AFRESH}"
                )

    # --- loading ----------------------------------------------------------------------------------

    def load(self) -> None:
        """Take over moments, fp32 copies, counters and settings, one tensor at a time; layers and
        heads have been loaded from their files."""
        with torch.no_grad():
            for parameter, name in self.names.items():
                if MASTERS in self.saved.keys(name) and not self.in_bf16:
                    values = self.saved.read(name, MASTERS, 0, parameter.numel())
                    parameter.copy_(values.view(parameter.shape))
            groups = self.engine.basic_optimizer.param_groups
            for group, shares in zip(groups, self._groups(), strict=True):
                by_holder: dict[Tensor, list[Share]] = {}
                for share in shares:
                    by_holder.setdefault(share.holder, []).append(share)
                    group.update(_settings(self.saved.settings[self.names[share.parameter]]))
                for holder, own in by_holder.items():
                    state = self._state(holder, own, group)
                    if state:
                        self.engine.basic_optimizer.state[holder] = state

    def _state(
        self, holder: Tensor, shares: list[Share], group: Mapping[str, Any]
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        on_device = group.get("capturable") or group.get("fused")
        for share in shares:
            name, stretch = self.names[share.parameter], slice(share.offset, _end(share))
            if self.flat and share.length:
                key = MASTERS if MASTERS in self.saved.keys(name) else WEIGHTS
                holder[stretch].copy_(self.saved.read(name, key, share.start, share.length))
            for key in self.saved.moments(name) if share.length else ():
                values = self.saved.read(name, key, share.start, share.length)
                if key not in state:
                    state[key] = torch.zeros_like(
                        holder, dtype=values.dtype, memory_format=torch.contiguous_format
                    )
                state[key].view(-1)[stretch].copy_(values)
            for key, value in self.saved.counters[name].items():
                state[key] = _later(state.get(key), value)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                where = holder.device if on_device else torch.device("cpu")
                state[key] = to_device(value.clone(), where)
        return state

    # --- comparing --------------------------------------------------------------------------------

    def compare(self) -> int:
        """Every tensor of the model and of its optimizer against the checkpoint, by name and
        checksum: each rank sums what it holds, and a part of the files. A collective call.

        Returns:
            How many tensors are the same.

        Raises:
            CheckpointError: on every rank, naming those that are not.
        """
        gathered = gather((self.engine.replica_id, self._own_sums(), self._wanted_sums()))
        wanted: Sums = {}
        found: dict[int, Sums] = {}  # of each replica the tensors that it has whole; -1: of all
        for replica, own, share_of_wanted in gathered:
            _add(wanted, share_of_wanted)
            for at, value in own.items():
                cut = self.flat and at[1] != WEIGHTS
                _add(found.setdefault(-1 if cut else replica, {}), {at: value})
        taken = {at for sums in found.values() for at in sums}
        parts = {part_of(name) for name, _ in taken}
        wrong = {at for sums in found.values() for at in sums if sums[at] != wanted.get(at)}
        wrong |= {
            at for at in wanted.keys() - taken if not is_head(at[0]) or part_of(at[0]) in parts
        }
        if wrong:
            some = ", ".join(f"{name} ({key})" for name, key in sorted(wrong)[:4])
            raise CheckpointError(
                f"{len(wrong)} tensors are not what the checkpoint has under their names, among "
                f"them {some}; go on in the layout that saved it, and report this"
            )
        return len(taken)

    def _own_sums(self) -> Sums:
        parts = self.engine.module.segment_parts
        sums: Sums = {
            (lasting_name(name, parts), WEIGHTS): checksum(tensor.detach().reshape(-1))
            for name, tensor in self.engine.module.state_dict().items()
            if not name.startswith(self._afresh)
        }
        state = self.engine.basic_optimizer.state
        for share in (share for group in self._groups() for share in group if share.length):
            name, stretch = self.names[share.parameter], slice(share.offset, _end(share))
            tensors = {key: state[share.holder][key] for key in self.saved.moments(name)}
            if self.flat:
                tensors[MASTERS] = share.holder
            for key, tensor in tensors.items():
                values = tensor.detach().reshape(-1)[stretch]
                _add(sums, {(name, key): checksum(values, share.start)})
        return sums

    def _wanted_sums(self) -> Sums:
        """Of this rank's share of the checkpoint's stages."""
        rank, count = self.engine.global_rank, len(gather(None))
        sums: Sums = {}
        for stage in range(rank, self._source[1]["num_stages"], count):
            saved = SavedState(*self._source, self.saved.layers_of(stage))
            for piece in saved.pieces():
                masters = MASTERS in saved.keys(piece.name)
                for key, values in self._as_here(piece.name, piece.key, piece.values, masters):
                    _add(sums, {(piece.name, key): checksum(values, piece.start)})
        return sums

    def _as_here(
        self, name: str, key: str, values: Tensor, masters: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """What a tensor of the checkpoint should be in this run: under its key, under others too,
        or under none.

        Args:
            masters: does the checkpoint have the name's fp32 copies?
        """
        if key != WEIGHTS and name not in self.trained.get(part_of(name), ()):
            return
        if key == MASTERS:
            if self.flat:
                yield MASTERS, values
            if not self.in_bf16:
                yield WEIGHTS, values
        elif key == WEIGHTS:
            if self.in_bf16 or not masters:
                yield WEIGHTS, self._as_computed_with(values)
            if self.flat and not masters and name in self.trained.get(part_of(name), ()):
                yield MASTERS, values.float()
        else:
            yield key, values

    def _as_computed_with(self, values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        if self.in_bf16:
            return values.to(torch.bfloat16)
        return values.float() if values.dtype == torch.bfloat16 else values


def trained_names(engine: StageUpdates) -> dict[str, list[str]]:
    """Lasting names of all parameters that the whole model's optimizers step, by layer or head. A
    collective call."""
    parts = engine.module.segment_parts
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    own = [
        lasting_name(names[share.parameter], parts)
        for group in shares_of(engine.optimizer)
        for share in group
        if share.parameter in names
    ]
    everybodys = dict.fromkeys(name for found in gather(own) for name in found)
    return trained_by_part(list(everybodys))


def _end(share: Share) -> int:
    return share.offset + share.length


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _later(one: Any, other: Any) -> Any:
    """The larger of two counters."""
    return other if one is None or float(other) > float(one) else one


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in NOT_SHARED}


def _add(sums: Sums, more: Sums) -> None:
    for at, value in more.items():
        sums[at] = (sums.get(at, 0) + value) % 2**64
