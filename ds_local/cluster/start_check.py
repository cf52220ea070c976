"""Is everybody here, and the same? Found out before the processes meet, and said in a sentence.

A job over many machines fails in ways that look alike: it hangs. So before any process group is
made every rank looks at its own surroundings, reports to rank 0 over the launcher's key-value
store, and opens a plain connection to its neighbours. Rank 0 judges, and all ranks end with its
verdict within the limit. `measure_edges` afterwards times a message on every edge.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import distributed as dist

from ds_local.cluster.surroundings import check_surroundings, own_address
from ds_local.errors import ClusterError
from ds_local.links.buffers import Tag
from ds_local.links.transport import make_end

LIMIT_SECONDS = 180.0  # for the whole check, by default
CONNECT_SECONDS = 5.0  # for a plain connection to a neighbour
PACKAGES = ("ds_local", "torch", "deepspeed", "transformers")

# what must be equal on all ranks -> remedy
REMEDIES = {
    "world_size": "start all ranks with one launcher command, or give every node the same "
    "--nnodes and hostfile",
    "versions": "install the same packages everywhere (constraints.txt)",
    "code": "bring every node to the same checkout",
    "config": "give every node the same config files and arguments",
    "data": "copy one prepared data folder to every node",
}


# --- all ranks together ---------------------------------------------------------------------------


def fingerprint(*parts: Any) -> str:
    """Short hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def data_fingerprint(folder: str | Path) -> str:
    """Of a prepared data folder: what it says about itself, and the sizes of its files."""
    folder = Path(folder)
    sizes = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.glob("*/*.arrow"))
    return fingerprint((folder / "prepared.json").read_text(), sizes)


def own_facts(config: Any = None, data: str | Path | None = None) -> dict[str, Any]:
    """What this rank tells the others about itself."""
    package = Path(__file__).parents[1]
    return {
        "host": socket.gethostname(),
        "address": own_address(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "code": fingerprint(
            [
                (str(path.relative_to(package)), path.read_text())
                for path in sorted(package.rglob("*.py"))
            ]
        ),
        "config": fingerprint(config),
        "data": None if data is None else data_fingerprint(data),
    }


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
        serves = self.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if serves and _is_taken(port):
            raise ClusterError(
                f"{self.here}: port {port} is in use, perhaps by another job; pass --master_port "
                "with a free one"
            )
        try:
            return dist.TCPStore(
                address,
                port,
                self.world_size,
                serves,
                timedelta(seconds=self.limit_seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError) as error:  # torch raises several kinds, all of these
            raise ClusterError(
                f"{self.here} cannot reach rank 0 at {address}:{port} within "
                f"{self.limit_seconds:.0f} s; is rank 0 running, is this an address of its "
                f"machine, does a firewall close the port? ({str(error).splitlines()[0][:120]})"
            ) from error

    def gather(self, name: str, value: Any) -> dict[int, Any]:
        """Everybody's value on rank 0, as far as they came in time; {} elsewhere."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
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
        self.judge(name, _absent(found, self))
        return list(json.loads(self._store.get(f"{name}/all")))

    @classmethod
    def release(cls) -> None:
        """Let go of the stores, once the process group is gone."""
        cls._kept.clear()

    def judge(self, name: str, verdict: str) -> None:
        """Rank 0's verdict, on all ranks: none is "".

        Raises:
            ClusterError: with the verdict.
        """
        key = f"{name}/verdict"
        if self.rank == 0:
            self._store.set(key, verdict)
        else:
            began = time.monotonic()
            try:
                self._store.wait(
                    [key],
                    timedelta(seconds=max(1.0, self.deadline - time.monotonic()) + CONNECT_SECONDS),
                )
                verdict = self._store.get(key).decode()
            except RuntimeError as error:
                raise ClusterError(
                    f"{self.here} waited {time.monotonic() - began:.0f} s for rank 0's word; see "
                    "what rank 0 says"
                ) from error
        if verdict:
            self._leave_last(f"{name}/read")
            raise ClusterError(verdict)

    def _leave_last(self, key: str) -> None:
        """Rank 0 holds the store, so it goes when the others have read, or after a moment."""
        self._store.add(key, 1)
        end = time.monotonic() + CONNECT_SECONDS
        while (
            self.rank == 0 and self._store.add(key, 0) < self.world_size and time.monotonic() < end
        ):
            time.sleep(0.05)


def _is_taken(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return True
    return False


def check_start(
    facts: dict[str, Any],
    neighbours: Sequence[int] = (),
    limit_seconds: float = LIMIT_SECONDS,
    environment: Mapping[str, str] = os.environ,
    builds: str | None = None,
) -> dict[int, Any]:
    """Every rank is here, the same as rank 0, and reaches its neighbours. All ranks call it before
    they make a process group.

    Args:
        facts: from `own_facts`.
        neighbours: ranks that this one will exchange messages with.
        builds: what DeepSpeed may have to build; see `builds_of`.

    Returns:
        On rank 0 everybody's facts.

    Raises:
        ClusterError: the same sentence on all ranks, within the limit and a few seconds.
    """
    check_surroundings(environment, builds=builds)
    assembly = Assembly(limit_seconds, environment)
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(256)
        everybody = assembly.gather("facts", {**facts, "port": listener.getsockname()[1]})
        assembly.judge(
            "facts",
            _absent(everybody, assembly) or _different(everybody) if assembly.rank == 0 else "",
        )
        unreachable = _unreachable(
            assembly, facts, sorted({*neighbours, (assembly.rank + 1) % assembly.world_size})
        )
        told = assembly.gather("reach", unreachable)
        assembly.judge(
            "reach", _absent(told, assembly) or next((word for word in told.values() if word), "")
        )
    return everybody


def _absent(found: Mapping[int, Any], assembly: Assembly) -> str:
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


def _different(everybody: Mapping[int, dict[str, Any]]) -> str:
    first = everybody[0]
    for key, remedy in REMEDIES.items():
        for rank, facts in sorted(everybody.items()):
            if facts[key] != first[key]:
                theirs, ours = facts[key], first[key]
                if isinstance(theirs, dict):
                    changed = [name for name in theirs if theirs[name] != ours.get(name)]
                    theirs, ours = (
                        ", ".join(f"{name} {of.get(name)}" for name in changed)
                        for of in (theirs, ours)
                    )
                return (
                    f"rank {rank} on {facts['host']} differs from rank 0 on {first['host']} in its "
                    f"{key.replace('_', ' ')}: {theirs} instead of {ours}; {remedy}"
                )
    return ""


def _unreachable(assembly: Assembly, facts: dict[str, Any], ranks: Iterable[int]) -> str:
    """A sentence about the first neighbour on another host that cannot be reached."""
    for rank in ranks:
        if rank == assembly.rank:
            continue
        other = json.loads(assembly._store.get(f"facts/{rank}"))
        same = other["host"] == facts["host"] and other["address"] == facts["address"]
        if not same and other["address"].startswith("127."):
            why = f"its name resolves to the loopback address {other['address']}"
        else:
            try:
                socket.create_connection((other["address"], other["port"]), CONNECT_SECONDS).close()
                continue
            except OSError as error:
                why = f"{other['address']} does not answer ({error.strerror or error})"
        return (
            f"rank {assembly.rank} on {facts['host']} cannot reach rank {rank} on {other['host']}: "
            f"{why}; set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) on every node to the "
            "interface that connects them"
        )
    return ""


# --- who is where ---------------------------------------------------------------------------------


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


def stage_hosts(stage: int) -> dict[str, list[int]]:
    """The hosts of every stage, for run.json: {"stage 0": {"hosts": [...], "ranks": [...]}}. A
    collective call."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (stage, socket.gethostname()))
    found: dict[str, Any] = {}
    for rank, (of, host) in enumerate(gathered):
        entry = found.setdefault(f"stage {of}", {"hosts": [], "ranks": []})
        entry["ranks"].append(rank)
        entry["hosts"] += [] if host in entry["hosts"] else [host]
    return dict(sorted(found.items(), key=lambda item: int(item[0].split()[1])))


def describe_hosts(hosts: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{stage} on {', '.join(e['hosts'])} (ranks {spans(e['ranks'])})"
        for stage, e in hosts.items()
    )


# --- links ----------------------------------------------------------------------------------------


def measure_edges(
    ranks: Sequence[Sequence[int]], timeout_seconds: float, megabytes: float = 4.0
) -> list[dict[str, Any]]:
    """A message on every edge between two stages. A collective call.

    Args:
        ranks: for each replica the global rank of each stage.

    Returns:
        On every rank, for each edge: ranks, hosts, "latency_seconds" of a small message, "gbps" of
        large ones.

    Raises:
        TransportError: naming the edge that does not answer.
    """
    stage = next(
        s for replica in ranks for s, rank in enumerate(replica) if rank == dist.get_rank()
    )
    found = []
    for lower in range(len(ranks[0]) - 1):
        up, down, large = (
            make_end(
                f"{way} edge {lower} - {lower + 1}",
                stage,
                a,
                b,
                ranks,
                4,
                timeout_seconds,
                torch.device("cpu"),
            )
            for way, a, b in (
                ("small up", lower, lower + 1),
                ("small down", lower + 1, lower),
                ("large up", lower, lower + 1),
            )
        )
        if stage in (lower, lower + 1):
            measured = _time_edge(stage == lower, up, down, large, megabytes)
            found += [{**measured, "lower": lower}] if measured else []
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), found))
    edges = []
    for rank, (host, measured) in enumerate(gathered):
        for edge in measured:
            edges.append(
                {
                    "ranks": [edge["from"], rank],
                    "hosts": [gathered[edge["from"]][0], host],
                    "stages": [edge["lower"], edge["lower"] + 1],
                    "latency_seconds": edge["latency"],
                    "gbps": edge["gbps"],
                }
            )
    return edges


def _time_edge(
    is_lower: bool, up: Any, down: Any, large: Any, megabytes: float, repeats: int = 8
) -> dict[str, Any] | None:
    """The upper end's measurements; None at the lower end."""
    small, payload = {"x": torch.zeros(1)}, {"x": torch.zeros(int(megabytes * 2**18))}
    times = []
    if is_lower:
        for n in range(repeats):
            up.send(Tag(0, n), small)
            down.receive(Tag(0, n))
        for n in range(repeats):
            large.send(Tag(0, n), payload)
        large.flush()
        return None
    for n in range(repeats):
        up.receive(Tag(0, n))
        times.append(time.perf_counter())
        down.send(Tag(0, n), small)
    down.flush()
    trips = sorted(b - a for a, b in pairwise(times))
    times = []
    for n in range(repeats):
        large.receive(Tag(0, n))
        times.append(time.perf_counter())
    seconds = (times[-1] - times[1]) / (repeats - 2)
    gbps = 8 * payload["x"].nbytes / seconds / 1e9
    return {"from": up.peer.rank, "latency": trips[len(trips) // 2] / 2, "gbps": gbps}
