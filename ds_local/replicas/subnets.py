"""Independent subnet training on the data-parallel axis (Yuan et al. 2019, arXiv 1910.02120), for
transformer blocks.

Every `every` steps each block's attention heads and MLP hidden units are dealt out among the R
replicas of a stage. Until the next deal a replica trains its share alone, on physically smaller
matrices and on its own data: no gradient is averaged. The residual stream stays whole, so each
matrix is cut in one dimension, and all R shares together are all of it in every round. What is not
dealt out (embeddings, norms, biases on the residual side, heads, readout) each replica holds whole;
an exchange averages it.

An exchange moves each weight from the replica that had it to the one that gets it, layer by layer;
with it go the optimizer's moments. What can be cut, and who gets what, is in `cuts`. No DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.config.sections import ReplicasConfig
from ds_local.links.device import to_host
from ds_local.model import blocks
from ds_local.replicas.cuts import (
    CUTS,
    TRAINING_FACTORS,
    Deal,
    common,
    deal,
    merged_factor,
    put,
    take,
)
from ds_local.replicas.engine import Engine
from ds_local.replicas.group import Parcels
from ds_local.replicas.periodic import Periodic
from ds_local.replicas.sync import WEIGHTS, Apart, Slot, Together


class Subnets(Apart):
    """Cuts the blocks of an engine and exchanges their parts. Made from outside, after the engine;
    see `make_sync`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.config = engine.module.hf_config
        self.cuts = {kind: CUTS[self.config.model_type][kind] for kind in self.settings.partition}
        self.units: dict[str, int] = {
            kind: cut.units(self.config) for kind, cut in self.cuts.items()
        }
        layers = {part: engine.module.get_submodule(part) for part in self.parts}
        self.blocks: dict[str, nn.Module] = {
            part: layer.block for part, layer in layers.items() if isinstance(layer, blocks.Block)
        }
        self._full_sizes = {
            (part, path): _attribute(block, path)
            for part, block in self.blocks.items()
            for cut in self.cuts.values()
            for path in cut.sizes
        }
        self.round: int | None = None  # None: the whole model
        self._places = {
            id(parameter): (part, name)
            for part, parameters in self.parts.items()
            for name, parameter in parameters.items()
        }
        for block in self.blocks.values():
            for cut in self.cuts.values():
                block.get_submodule(cut.output).register_forward_pre_hook(self._scaled)
        self.start_from_whole()

    def _scaled(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What enters a projection back to the residual stream, times the factor of the moment."""
        scale, replicas = self.settings.scale, self.group.size
        factor = (
            merged_factor(scale, replicas)
            if self.round is None
            else TRAINING_FACTORS[scale](replicas)
        )
        return args if factor == 1.0 else (args[0] * factor, *args[1:])

    # --- who holds what ---------------------------------------------------------------------------

    def deal_of(self, part: str, round_: int) -> Deal:
        seed, replicas = self.engine.section.seed, self.group.size
        return {
            kind: deal(seed, round_, int(part), kind, units, replicas)
            for kind, units in self.units.items()
        }

    def state_depends_on(self, settings: ReplicasConfig, seed: int) -> dict[str, Any]:
        return {"every": settings.every, "partition": sorted(settings.partition), "seed": seed}

    def whole_shape(self, tensor: Tensor) -> torch.Size:
        part, name = self._places.get(id(tensor), ("", ""))
        where = self.cut_of(part, name)
        if where is None or self.round is None:
            return tensor.shape
        _, dim, _ = where
        shape = list(tensor.shape)
        shape[dim] *= self.group.size
        return torch.Size(shape)

    def everything(self) -> Deal:
        return {kind: [torch.arange(units)] * self.group.size for kind, units in self.units.items()}

    def cut_of(self, part: str, name: str) -> tuple[str, int, int] | None:
        """(kind, dimension, repeats) of a parameter that is cut, None for one that is shared."""
        if part in self.blocks:
            for kind, cut in self.cuts.items():
                found = cut.parameters.get(name.removeprefix(f"{part}.block."))
                if found:
                    return kind, *found
        return None

    def split(
        self, part: str, slots: Iterable[Slot]
    ) -> tuple[list[tuple[Slot, str, int, int]], list[Slot]]:
        """(what is cut, and how; what is shared)."""
        cut, shared = [], []
        for slot in slots:
            found = self.cut_of(part, slot.name)
            if found is None:
                shared.append(slot)
            else:
                cut.append((slot, *found))
        return cut, shared

    # --- exchanges --------------------------------------------------------------------------------

    def meet(self) -> None:
        rule = self.settings.optimizer_state
        old, new = self._round_in_force(), self.engine.global_steps // self.settings.every
        travels = [
            (
                part,
                [
                    slot
                    for slot in self.slots(part, rule != "reset")
                    if rule == "carry" or slot.key in _WITHOUT_FIRST
                ],
            )
            for part in self.parts
        ]
        self._exchange(travels, old, new)
        self._resize(new)
        self._forget(rule)

    def merge(self, moments: bool) -> None:
        old = self._round_in_force()
        self._exchange([(part, self.slots(part, moments)) for part in self.parts], old, None)
        self._resize(None)

    def _round_in_force(self) -> int:
        assert self.round is not None, "the model is whole at this moment"
        return self.round

    def _exchange(
        self, travels: Iterable[tuple[str, list[Slot]]], old_round: int, new_round: int | None
    ) -> None:
        """From one deal to the next, or to the whole model. While a part's shares travel, what it
        shares is averaged, the part before is put in place, and the next one is cut and sent:
        shares of two parts are under way at most."""
        before: Callable[[], None] | None = None
        for part, slots in travels:
            cut, shared = self.split(part, slots)
            receive = None
            if cut:
                held = self.deal_of(part, old_round)
                wanted = self.everything() if new_round is None else self.deal_of(part, new_round)
                receive = partial(self._receive, cut, held, wanted, self._send(cut, held, wanted))
            if before is not None:
                before()
            self.share(shared)
            before = receive
        if before is not None:
            before()

    def _send(self, cut: list[tuple[Slot, str, int, int]], held: Deal, wanted: Deal) -> Parcels:
        me = self.group.index
        parcels, sizes = [], []
        for other in range(self.group.size):
            pieces = []
            size = 0
            for slot, kind, dim, repeats in cut:
                mine, theirs = held[kind][me], held[kind][other]
                tensor = slot.read()
                pieces.append(take(tensor, dim, repeats, mine, common(mine, wanted[kind][other])))
                size += len(common(theirs, wanted[kind][me])) * tensor.numel() // len(mine)
            parcels.append(to_host(pieces))
            sizes.append(size)
        return self.group.exchange(parcels, sizes)

    def _receive(
        self, cut: list[tuple[Slot, str, int, int]], held: Deal, wanted: Deal, under_way: Parcels
    ) -> None:
        me = self.group.index
        received = under_way.wait()
        offsets = [0] * self.group.size
        for slot, kind, dim, repeats in cut:
            old = slot.read()
            shape = list(old.shape)
            shape[dim] = shape[dim] // len(held[kind][me]) * len(wanted[kind][me])
            new = old.new_empty(shape)
            for other in range(self.group.size):
                units = common(held[kind][other], wanted[kind][me])
                size = len(units) * old.numel() // len(held[kind][me])
                piece = received[other][offsets[other] : offsets[other] + size]
                put(new, dim, repeats, wanted[kind][me], units, piece)
                offsets[other] += size
            slot.write(new)

    def _forget(self, rule: str) -> None:
        """Moments that do not travel."""
        state = self.engine.optimizer.state
        if rule == "reset":
            state.clear()
        elif rule == "keep_second_moment":
            for parameter, moments in state.items():
                for key, value in moments.items():
                    if key not in _WITHOUT_FIRST and key != "step" and isinstance(value, Tensor):
                        moments[key] = torch.zeros_like(parameter)

    # --- whole and cut ----------------------------------------------------------------------------

    def _resize(self, round_: int | None) -> None:
        """Tell Hugging Face's modules how many units they have."""
        self.round = round_
        share = 1 if round_ is None else self.group.size
        for (part, path), size in self._full_sizes.items():
            owner, _, name = path.rpartition(".")
            setattr(self.blocks[part].get_submodule(owner), name, size // share)

    def part_again(self) -> None:
        self._resize(self._round_now())

    def _round_now(self) -> int:
        return self.engine.global_steps // self.settings.every

    def before_load(self) -> None:
        super().before_load()
        if self.round is None:
            return
        for part in self.blocks:
            for slot, *_ in self.split(part, self.slots(part, moments=False))[0]:
                slot.write(slot.read().new_empty(self.whole_shape(slot.parameter)))
        self._resize(None)

    def start_from_whole(self) -> None:
        """Keep this replica's share of the full model that all replicas hold at this moment."""
        me, now = self.group.index, self._round_now()
        for part in self.blocks:
            dealt = self.deal_of(part, now)
            for slot, kind, dim, repeats in self.split(part, self.slots(part, moments=True))[0]:
                slot.write(
                    take(slot.read(), dim, repeats, torch.arange(self.units[kind]), dealt[kind][me])
                )
        self._resize(now)


_WITHOUT_FIRST = (WEIGHTS, "exp_avg_sq", "max_exp_avg_sq")  # what travels when first moments do not


def _attribute(block: nn.Module, path: str) -> int:
    owner, _, name = path.rpartition(".")
    return getattr(block.get_submodule(owner), name)


_SYNCS: dict[str, Callable[[Engine], Together]] = {
    "gradients": lambda engine: Together(),
    "subnets": Subnets,
    "periodic": Periodic,
}


def make_sync(engine: Engine) -> Together:
    """What the config's "replicas" section asks for. A collective call."""
    return _SYNCS[engine.section.replicas.sync](engine)
