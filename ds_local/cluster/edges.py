"""Which hosts the stages are on, and how fast the edges between them are."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import distributed as dist

from ds_local.cluster.assembly import spans
from ds_local.links.agreement import gather
from ds_local.links.buffers import Tag
from ds_local.links.groups import Groups
from ds_local.links.transport import make_end

_LARGE = 2**22  # bytes of a large message
_REPEATS = 8


def stage_hosts(stage: int) -> dict[str, list[int]]:
    """The hosts of every stage, for run.json: {"stage 0": {"hosts": [...], "ranks": [...]}}. A
    collective call."""
    found: dict[str, Any] = {}
    for rank, (of, host) in enumerate(gather((stage, socket.gethostname()))):
        entry = found.setdefault(f"stage {of}", {"hosts": [], "ranks": []})
        entry["ranks"].append(rank)
        entry["hosts"] += [] if host in entry["hosts"] else [host]
    return dict(sorted(found.items(), key=lambda item: int(item[0].split()[1])))


def describe_hosts(hosts: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{stage} on {', '.join(e['hosts'])} "
        f"({'ranks' if len(e['ranks']) > 1 else 'rank'} {spans(e['ranks'])})"
        for stage, e in hosts.items()
    )


def measure_edges(ranks: Sequence[Sequence[int]], timeout_seconds: float) -> list[dict[str, Any]]:
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
    found, groups = [], Groups()
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
                groups,
            )
            for way, a, b in (
                ("small up", lower, lower + 1),
                ("small down", lower + 1, lower),
                ("large up", lower, lower + 1),
            )
        )
        if stage in (lower, lower + 1):
            measured = _time_edge(stage == lower, up, down, large)
            found += [{**measured, "lower": lower}] if measured else []
    gathered = gather((socket.gethostname(), found))
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


def _time_edge(is_lower: bool, up: Any, down: Any, large: Any) -> dict[str, Any] | None:
    """The upper end's measurements; None at the lower end."""
    small, payload = {"x": torch.zeros(1)}, {"x": torch.zeros(_LARGE // 4)}
    times = []
    if is_lower:
        for n in range(_REPEATS):
            up.send(Tag(0, n), small)
            down.receive(Tag(0, n))
        for n in range(_REPEATS):
            large.send(Tag(0, n), payload)
        large.flush()
        return None
    for n in range(_REPEATS):
        up.receive(Tag(0, n))
        times.append(time.perf_counter())
        down.send(Tag(0, n), small)
    down.flush()
    trips = sorted(b - a for a, b in pairwise(times))
    times = []
    for n in range(_REPEATS):
        large.receive(Tag(0, n))
        times.append(time.perf_counter())
    seconds = (times[-1] - times[1]) / (_REPEATS - 2)
    gbps = 8 * payload["x"].nbytes / seconds / 1e9
    return {"from": up.peer.rank, "latency": trips[len(trips) // 2] / 2, "gbps": gbps}
