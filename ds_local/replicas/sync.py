"""How the replicas of a stage stay one model: `Together`, by averaging gradients in every step, or
`Apart`, each training by itself and meeting the others every so many steps.

`periodic.Periodic` averages weights of full replicas, `subnets.Subnets` deals them out. The engine
asks one of these at a few places. Stages never meet here.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_local.config.sections import ReplicasConfig
from ds_local.config.strict import SECTION
from ds_local.errors import CheckpointError
from ds_local.links.device import to_device
from ds_local.model.names import lasting_name
from ds_local.replicas.engine import Engine, Module
from ds_local.replicas.group import replica_group

WEIGHTS = "weights"
Write = Callable[[Any, str], None]  # state, path
Look = Callable[[str], dict[str, Any]]  # name of a file in a checkpoint -> its content


class Together:
    """Gradients are averaged in every step, by DeepSpeed."""

    reduces_gradients = True
    waited = 0.0
    num_bytes: float | None = None  # DeepSpeed's, not counted here

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def whole(self, moments: bool = False) -> AbstractContextManager[None]:
        """Inside, every replica holds the one full model that all of them make up, with its
        optimizer's moments if asked for."""
        return nullcontext()

    def save(self, write: Write, folder: str) -> None:
        """Add to a checkpoint what this replica alone knows."""

    def whole_shape(self, tensor: Tensor) -> torch.Size:
        """The shape in the full model of one of this stage's tensors."""
        return tensor.shape

    def check(self, look: Look, facts: Mapping[str, Any]) -> list[str]:
        """Would `load` find this replica's own state? Sentences about what it would leave out.

        Args:
            look: gives the content of a file of the checkpoint.

        Raises:
            CheckpointError: when the file is not what `save` writes.
        """
        return self._left_out(facts, {"sync": "gradients"})

    def _left_out(self, facts: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
        theirs = facts[SECTION]["replicas"]
        if theirs["sync"] == "gradients":
            return []  # nothing but the full model
        kept = {key: theirs[key] for key in ("sync", "every", "partition", "outer_momentum")}
        kept["replicas"] = facts["num_replicas"]
        return [
            f"the checkpoint's replicas trained apart ({kept}), this run's differ ({dict(own)}): "
            "it goes on from the merged model, what each replica had of its own is left out"
        ]

    def before_load(self) -> None:
        """Make room for the full model."""

    def load(self, look: Look | None, facts: Mapping[str, Any]) -> None:
        """Go on from the full model that has just been loaded, and from this replica's own state if
        it fits.

        Args:
            look: as for `check`; None: from the full model alone.
        """


# --- training apart -------------------------------------------------------------------------------


class Slot(NamedTuple):
    """A tensor in the shape of a parameter: its weights, or one of the optimizer's moments."""

    name: str  # of the parameter
    parameter: nn.Parameter
    key: str  # WEIGHTS, or the optimizer's word
    state: dict[str, Any]  # the optimizer's

    def read(self) -> Tensor:
        return self.parameter.data if self.key == WEIGHTS else self.state[self.key]

    def write(self, tensor: Tensor) -> None:
        if self.key == WEIGHTS:
            self.parameter.data = tensor
        else:
            self.state[self.key] = tensor


class Apart(Together, ABC):
    """Replicas that train apart for `every` steps and then meet. A part is a layer or a head; parts
    travel one by one."""

    reduces_gradients = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.settings = engine.section.replicas
        self.group = replica_group(engine)
        self.parts = parts_of(engine.module)

    @property
    def waited(self) -> float:  # type: ignore[override]
        return self.group.waited

    @property
    def num_bytes(self) -> float:  # type: ignore[override]
        return self.group.num_bytes

    def after_step(self) -> None:
        if self.engine.global_steps % self.settings.every == 0:
            self.meet()

    @abstractmethod
    def meet(self) -> None:
        """Exchange what has been learnt."""

    def slots(self, part: str, moments: bool) -> list[Slot]:
        """The tensors of a part, in the same order on all replicas."""
        found = []
        for name, parameter in self.parts[part].items():
            state = self.engine.optimizer.state.get(parameter, {})
            keys = (
                [
                    key
                    for key, value in state.items()
                    if key != "step"
                    and isinstance(value, Tensor)
                    and value.shape == parameter.shape
                ]
                if moments
                else []
            )
            found += [Slot(name, parameter, key, state) for key in (WEIGHTS, *sorted(keys))]
        return found

    def share(self, slots: Sequence[Slot]) -> None:
        """Average what all replicas hold."""
        for slot, mean in zip(
            slots, self.group.average([slot.read() for slot in slots]), strict=True
        ):
            slot.write(mean.clone())  # of its own, not a view of all

    @contextmanager
    def whole(self, moments: bool = False) -> Iterator[None]:
        own = [(slot, slot.read()) for part in self.parts for slot in self.slots(part, moments)]
        try:
            self.merge(moments)
            yield
        finally:
            for slot, tensor in own:
                slot.write(tensor)
            self.part_again()

    def merge(self, moments: bool) -> None:
        """Make this replica the whole model."""
        for part in self.parts:
            self.share(self.slots(part, moments))

    def part_again(self) -> None:
        """Called when this replica's own weights are back in their places."""

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, write: Write, folder: str) -> None:
        tensors: dict[str, dict[str, Tensor]] = {}
        for part in self.parts:
            for slot in self.slots(part, moments=True):
                tensors.setdefault(slot.name, {})[slot.key] = slot.read().clone()
        state = {"tensors": tensors, **self.extra_state()}
        write(state, os.path.join(folder, _file(self.group.index, self.group.stage)))

    @abstractmethod
    def state_depends_on(self, settings: ReplicasConfig, seed: int) -> dict[str, Any]:
        """What must be the same for a replica's own state to be of use."""

    def _depends_on(self, section: Mapping[str, Any], num_replicas: int) -> dict[str, Any]:
        settings = ReplicasConfig.model_construct(**section["replicas"])
        same = {"sync": settings.sync, "replicas": num_replicas}
        if settings.sync != self.settings.sync:
            return same
        return same | self.state_depends_on(settings, section["seed"])

    def _own(self) -> dict[str, Any]:
        section = self.engine.section.model_dump(mode="json")
        return self._depends_on(section, self.engine.dp_world_size)

    def _fits(self, facts: Mapping[str, Any]) -> bool:
        return self._depends_on(facts[SECTION], facts["num_replicas"]) == self._own()

    def _outer_fits(self, facts: Mapping[str, Any]) -> bool:
        """Can what is the same on all replicas go on, whatever their number is?"""
        theirs = self._depends_on(facts[SECTION], self.engine.dp_world_size)
        return theirs == self._own() and bool(self.extra_state())

    def _state_of(self, look: Look, facts: Mapping[str, Any], replica: int) -> dict[str, Any]:
        """What a replica saved, in whichever stages, of this stage's tensors, by its names."""
        saved, own = facts["segment_parts"], self.engine.module.segment_parts
        names = {lasting_name(n, own): n for part in self.parts.values() for n in part}
        found: dict[str, dict[str, Any]] = {}
        for stage in range(facts["num_stages"]):
            for kind, tensors in look(_file(replica, stage)).items():
                lasting = {lasting_name(n, saved): tensor for n, tensor in tensors.items()}
                own_of = {names[n]: tensor for n, tensor in lasting.items() if n in names}
                found.setdefault(kind, {}).update(own_of)
        return found

    def check(self, look: Look, facts: Mapping[str, Any]) -> list[str]:
        if not self._fits(facts):
            if self._outer_fits(facts):
                self._state_of(look, facts, 0)
            return self._left_out(facts, self._own())
        own = {slot.name: slot for part in self.parts for slot in self.slots(part, moments=False)}
        try:
            state = self._state_of(look, facts, self.group.index)
            tensors = state["tensors"]
            fits = all(name.startswith("heads.") for name in own.keys() - tensors.keys()) and all(
                WEIGHTS in found
                and all(one.shape == own[name].parameter.shape for one in _without_steps(found))
                for name, found in tensors.items()
            )
            for key, value in self.extra_state().items():
                fits &= all(state[key][n].shape == value[n].shape for n in value.keys() & tensors)
        except (KeyError, TypeError, AttributeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{_file(self.group.index, self.group.stage)} is not the state of this replica; "
                "use another checkpoint, or load weights only (load_optimizer_states=False)"
            )
        return []

    def before_load(self) -> None:
        self.engine.optimizer.state.clear()

    def load(self, look: Look | None, facts: Mapping[str, Any]) -> None:
        self.start_from_whole()
        if look is None:
            return
        if self._fits(facts):
            state = self._state_of(look, facts, self.group.index)
            for part in self.parts:
                for slot in self.slots(part, moments=True):
                    if slot.name in state["tensors"]:  # a head that starts afresh is not
                        slot.write(self._here(state["tensors"][slot.name][slot.key]))
            self._load_extra(state)
        elif self._outer_fits(facts):
            self._load_extra(self._state_of(look, facts, 0))

    def _load_extra(self, state: Mapping[str, Any]) -> None:
        for key, own in self.extra_state().items():
            own |= {name: self._here(tensor) for name, tensor in state[key].items()}

    def _here(self, tensor: Tensor) -> Tensor:
        """A tensor of a file, which may change."""
        return to_device(tensor.clone(), self.engine.device)

    def start_from_whole(self) -> None:
        """Go on from the full model."""

    def extra_state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by kind and parameter name that are the same on all replicas."""
        return {}


def _file(replica: int, stage: int) -> str:
    return f"replica_{replica:02d}-stage_{stage:02d}-model_states.pt"


def _without_steps(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for key, value in state.items() if key != "step"]


def parts_of(module: Module) -> dict[str, dict[str, nn.Parameter]]:
    """Layer or head -> name in the stage -> parameter."""
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        words = name.split(".")
        part = ".".join(words[: 2 if words[0] in ("heads", "tied_modules") else 1])
        parts.setdefault(part, {})[name] = parameter
    return parts
