"""All ranks of a job, as they come together before the process group exists."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from itertools import count, groupby
from typing import Any, ClassVar

from torch import distributed as dist

from ds_local.errors import ClusterError
from ds_local.links.store_guard import limited

CONNECT_SECONDS = 5.0  # for a plain connection to a neighbour
LOOK_SECONDS = 0.02  # between two looks whether rank 0 is there


class Assembly:
    """The ranks before they meet, over the store that the launcher's MASTER_ADDR and MASTER_PORT
    name.

    Raises:
        ClusterError: when the port is taken, or rank 0 cannot be reached within the limit.
    """

    # by rank and place: the server must outlive the check, the process group is made with it
    _kept: ClassVar[dict[tuple[int, str, int], Any]] = {}
    _numbers: ClassVar[defaultdict[Any, Iterator[int]]] = defaultdict(count)  # of assemblies there

    def __init__(self, limit_seconds: float, environment: Mapping[str, str] = os.environ) -> None:
        self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.deadline = time.monotonic() + limit_seconds
        self.limit_seconds = limit_seconds
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        self.here = f"rank {self.rank} on {socket.gethostname()}"
        place = self.rank, address, port
        if place not in self._kept:
            self._kept[place] = self._connect(address, port, environment)
        restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        number = next(self._numbers[place])
        self._store = dist.PrefixStore(f"ds_local/start/{restarts}/{number}", self._kept[place])

    def _connect(self, address: str, port: int, environment: Mapping[str, str]) -> Any:
        serves = self.rank == 0 and not _is_of_agent(environment)
        if serves and _is_taken(port):
            raise ClusterError(
                f"{self.here}: port {port} is in use, perhaps by another job; pass --master_port "
                "with a free one"
            )
        if not serves:
            _await_listener(address, port, self.deadline)
        left = timedelta(seconds=max(1.0, self.deadline - time.monotonic()))
        options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
        try:
            store = limited(
                lambda: dist.TCPStore(address, port, self.world_size, serves, left, **options),
                left.total_seconds() + CONNECT_SECONDS,
            )
        # torch raises several kinds, all of these
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise ClusterError(
                f"{self.here} cannot reach rank 0 at {address}:{port} within "
                f"{self.limit_seconds:.0f} s; is rank 0 running, is this an address of its "
                f"machine, does a firewall close the port? ({str(error).splitlines()[0][:120]})"
            ) from error
        store.set_timeout(timedelta(seconds=self.limit_seconds))
        return store

    def gather(self, name: str, value: Any) -> dict[int, Any]:
        """Everybody's value on rank 0, as far as they came in time; {} elsewhere."""
        self._ask(lambda store: store.set(f"{name}/{self.rank}", json.dumps(value)))
        if self.rank:
            return {}
        waiting, found = set(range(self.world_size)), {}
        while waiting and time.monotonic() < self.deadline:
            for rank in sorted(waiting):
                if self._store.check([f"{name}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{name}/{rank}"))
                    waiting.remove(rank)
            time.sleep(0.05 if waiting else 0)
        return found

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Everybody's values, on every rank.

        Raises:
            ClusterError: naming the ranks that did not come in time.
        """
        found = self.gather(name, value)
        if self.rank == 0:
            self._store.set(
                f"{name}/all", json.dumps([found.get(r) for r in range(self.world_size)])
            )
        self.judge(name, absent(found, self))
        return list(json.loads(self._ask(lambda store: store.get(f"{name}/all"))))

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What the store answers.

        Raises:
            ClusterError: when rank 0, which holds it, does not.
        """
        try:
            return limited(lambda: question(self._store), self._patience())
        except (RuntimeError, TimeoutError) as error:
            raise ClusterError(
                f"{self.here} waited {self.limit_seconds:.0f} s for rank 0's word; see what rank 0 "
                "says"
            ) from error

    def _patience(self) -> float:
        """Seconds that a question to the store may still take."""
        return max(1.0, self.deadline - time.monotonic()) + CONNECT_SECONDS

    def store_of_group(self) -> Any:
        """The store that the process group is made with."""
        return dist.PrefixStore("group", self._store)

    @classmethod
    def release(cls) -> None:
        """Let go of the stores, once the process group is gone. Assemblies in the next store of a
        place are counted from the start, or ranks that were not in this one would count less."""
        cls._kept.clear()
        if not _is_of_agent(os.environ):
            cls._numbers.clear()

    def judge(self, name: str, verdict: str) -> None:
        """Rank 0's verdict, on all ranks: none is "".

        Raises:
            ClusterError: with the verdict.
        """
        key = f"{name}/verdict"
        if self.rank == 0:
            self._store.set(key, verdict)
        else:
            limit = timedelta(seconds=self._patience())
            self._ask(lambda store: store.wait([key], limit))
            verdict = self._ask(lambda store: store.get(key)).decode()
        if verdict:
            self._leave_last(f"{name}/read")
            raise ClusterError(verdict)

    def _leave_last(self, key: str) -> None:
        """Rank 0 holds the store, so it goes when the others have read, or after a moment."""
        self._ask(lambda store: store.add(key, 1))
        end = time.monotonic() + CONNECT_SECONDS
        while (
            self.rank == 0 and self._store.add(key, 0) < self.world_size and time.monotonic() < end
        ):
            time.sleep(0.05)


def _is_of_agent(environment: Mapping[str, str]) -> bool:
    """Does torchrun hold the store, which then outlives the process group?"""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_taken(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return True
    return False


def _await_listener(address: str, port: int, deadline: float) -> None:
    """Until rank 0 listens: torch's store, refused once, sleeps for half a second and more."""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), CONNECT_SECONDS).close()
        except ConnectionRefusedError:
            time.sleep(LOOK_SECONDS)
        except OSError:  # the store says what is wrong
            return
        else:
            return


def absent(found: Mapping[int, Any], assembly: Assembly) -> str:
    missing = sorted(set(range(assembly.world_size)) - set(found))
    if assembly.rank or not missing:
        return ""
    present = "; ".join(
        f"{host}: {spans(ranks)}"
        for host, ranks in _by_host({r: f for r, f in found.items() if isinstance(f, dict)}).items()
    )
    return (
        f"{'rank' if len(missing) == 1 else 'ranks'} {spans(missing)} of {assembly.world_size} did "
        f"not come within {assembly.limit_seconds:.0f} s (here are {present or 'all others'}); "
        "start them, or look why they ended"
    )


def spans(numbers: Iterable[int]) -> str:
    """ "0-3, 5" for 0, 1, 2, 3, 5."""
    runs = []
    for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(runs)


def _by_host(everybody: Mapping[int, dict[str, Any]]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for rank, facts in sorted(everybody.items()):
        hosts.setdefault(facts["host"], []).append(rank)
    return hosts
