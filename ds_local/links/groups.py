"""Groups of ranks that talk through the host, each made by its own ranks alone.

Torch's `new_group` is a call of all ranks, for every group of the run: a pipeline of P stages and R
replicas would need P x R of them for its edges alone, and torch lists each on every rank. Here a
rank makes a group with each rank that it talks with, once, and its links share it by tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d


class HostGroup:
    """A gloo group, with a connection between any two of its ranks.

    Args:
        name: in the store of the run; the same on all its ranks, and theirs alone.
        ranks: global, in the same order everywhere; this one among them.
    """

    def __init__(self, name: str, ranks: Sequence[int]) -> None:
        self.places = {rank: place for place, rank in enumerate(ranks)}
        store = dist.PrefixStore(name, distributed_c10d._get_default_store())
        place, limit = self.places[dist.get_rank()], distributed_c10d.default_pg_timeout
        self._gloo: Any = dist.ProcessGroupGloo(store, place, len(self.places), limit)
        self._next_tag = 0

    def take_tags(self, number: int = 1) -> int:
        """The first of so many tags that nobody else of the group uses. All its ranks take them in
        the same order."""
        first, self._next_tag = self._next_tag, self._next_tag + number
        return first

    def send(self, tensor: Tensor, rank: int, tag: int) -> Any:
        """Start sending. Returns what to wait for."""
        return self._gloo.send([tensor], self.places[rank], tag)

    def receive(self, tensor: Tensor, rank: int, tag: int) -> Any:
        """Start receiving; what comes may be shorter. Returns what to wait for."""
        return self._gloo.recv([tensor], self.places[rank], tag)


class Groups:
    """The groups of this rank for one owner, an engine say. They end with the world of ranks, as
    torch's do: another rank may need a connection longer than this one.

    All ranks make it in the same order; none waits for another there.
    """

    _made: ClassVar[WeakKeyDictionary[Any, list[Groups]]] = WeakKeyDictionary()  # in each world

    def __init__(self) -> None:
        before = self._made.setdefault(dist.group.WORLD, [])
        self._name = f"ds_local/{len(before)}"
        before.append(self)
        self._groups: dict[tuple[int, ...], HostGroup] = {}

    def of(self, ranks: Sequence[int]) -> HostGroup:
        """The group of these ranks. The first time all of them must ask for it, and each waits for
        the others."""
        key = tuple(ranks)
        if key not in self._groups:
            name = f"{self._name}/{'-'.join(map(str, ranks))}"
            self._groups[key] = HostGroup(name, ranks)
        return self._groups[key]

    def pair(self, rank: int) -> HostGroup:
        """The group of this rank and another one."""
        return self.of(sorted((dist.get_rank(), rank)))

    def __len__(self) -> int:
        return len(self._groups)


def second_world() -> Any:
    """A gloo group of all ranks, as torch knows groups: for collective calls of another thread. A
    collective call.

    Where the world is bound to a device, as DeepSpeed binds it for NCCL, torch would split NCCL's
    communicator for it; so the world is not bound meanwhile.
    """
    world: Any = dist.group.WORLD
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        return dist.new_group(backend="gloo")
    finally:
        world.bound_device_id = bound


def in_turn(edges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Edges of a pipeline in an order in which its stages can make their groups without a wait from
    one end to the other: in a chain first those above even stages, then the others.

    Args:
        edges: (stage, stage), in any order, perhaps more than once.
    """
    apart = {(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]}
    return sorted(apart, key=lambda edge: (edge[0] % 2, edge))
