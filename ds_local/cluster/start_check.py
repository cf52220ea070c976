"""Is everybody here, and the same? Found out before the processes meet, and said in a sentence.

A job over many machines fails in ways that look alike: it hangs. So before any process group is
made every rank looks at its own surroundings, reports to rank 0 over the launcher's key-value
store, and opens a plain connection to its neighbours. Rank 0 judges, and all ranks end with its
verdict within the limit. `edges.measure_edges` afterwards times a message on every edge.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_local.cluster.assembly import CONNECT_SECONDS, Assembly, absent
from ds_local.cluster.surroundings import check_surroundings, own_address
from ds_local.errors import ClusterError, first_line

LIMIT_SECONDS = 180.0  # for the whole check, by default
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


def fingerprint(*parts: Any) -> str:
    """Short hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def data_facts(folder: str | Path) -> tuple[str, int]:
    """Of a prepared data folder: a fingerprint of what it says about itself and the sizes of its
    files, and the tokens of a sequence.

    Raises:
        ClusterError: when it is missing, or none of ours.
    """
    folder = Path(folder)
    try:
        text = (folder / "prepared.json").read_text()
        seq_len = int(json.loads(text)["seq_len"])
        sizes = sorted(
            (str(p.relative_to(folder)), p.stat().st_size) for p in folder.glob("*/*.arrow")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or f"prepared.json: {first_line(error)}"
        raise ClusterError(
            f"{folder} is no prepared data folder ({why}); {REMEDIES['data']}"
        ) from error
    return fingerprint(text, sizes), seq_len


def own_facts(
    config: Any = None, data: str | Path | None = None, refused: str = ""
) -> dict[str, Any]:
    """What this rank tells the others about itself.

    Args:
        refused: why it cannot take part, if it knows already.
    """
    package = Path(__file__).parents[1]
    found = None
    try:
        found = None if data is None else data_facts(data)[0]
    except ClusterError as error:
        refused = refused or str(error)
    return {
        "refused": refused,
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
        "data": found,
    }


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
            absent(everybody, assembly) or _different(everybody) if assembly.rank == 0 else "",
        )
        unreachable = _unreachable(
            assembly, facts, sorted({*neighbours, (assembly.rank + 1) % assembly.world_size})
        )
        told = assembly.gather("reach", unreachable)
        assembly.judge(
            "reach", absent(told, assembly) or next((word for word in told.values() if word), "")
        )
    return everybody


def _different(everybody: Mapping[int, dict[str, Any]]) -> str:
    """A sentence about the first rank that cannot take part, or is not as rank 0."""
    for rank, facts in sorted(everybody.items()):
        if facts["refused"]:
            return f"rank {rank} on {facts['host']}: {facts['refused']}"
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
