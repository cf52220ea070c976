"""Make every mistake of docs/multi-node.md once, and show what is said and how long it took.

python scripts/misconfigurations.py [NAME...]

Ranks are threads here, each with an environment of its own; the checks are those that train.py and
check_cluster.py run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_local.cli.check import check_hosts
from ds_local.cluster import start_check as cluster
from ds_local.cluster.surroundings import check_surroundings, free_port, read_hostfile
from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.files import local_parallel
from ds_local.config.schema import LocalParallelConfig
from ds_local.errors import ClusterError

LIMIT_SECONDS = (
    3.0  # that ranks wait for each other, here; 60 in check_cluster.py, 180 in train.py by default
)
NOBODY = "192.0.2.1"  # an address for documentation, which no machine has


def ranks(
    world_size: int = 2,
    here: list[int] | None = None,
    change: dict[str, Any] | None = None,
    port: int = 0,
) -> None:
    """The start of a job; `change` is what differs on rank 1. Raises what the first of the ranks
    `here` raises."""
    facts = cluster.own_facts({"a": 1}) | {"world_size": world_size, "data": "7d0f6c2b91ae"}
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
    }
    shared["MASTER_PORT"] = str(port or free_port())

    def run(rank: int) -> Exception | None:
        mine = facts | (change or {} if rank == 1 else {})
        try:
            cluster.check_start(mine, (), LIMIT_SECONDS, {**shared, "RANK": str(rank)})
        except ClusterError as error:
            return error
        return None

    with ThreadPoolExecutor(world_size) as pool:
        errors = list(pool.map(run, range(world_size) if here is None else here))
    if errors[0] is not None:
        raise errors[0]


def surroundings(**environment: str) -> None:
    check_surroundings({"RANK": "1", **environment})


def hostfile(text: str, look: Callable[[str], Any] = read_hostfile) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hostfile")
        path.write_text(text)
        look(str(path))


def launcher_without_its_hostfile() -> None:
    """A stand-in for the launcher, which DeepSpeed lets start on this machine alone."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = Path(folder, "deepspeed")
        launcher.write_text("echo ready\nread answer\n")
        command = ["sh", str(launcher), "--hostfile", "/nowhere/hostfile"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            if process.stdout is not None:
                process.stdout.readline()  # its arguments can be read from now on
            check_surroundings({"RANK": "0"}, parent=process.pid)


@contextmanager
def port_of_another_job() -> Iterator[int]:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        yield s.getsockname()[1]


def port_in_use() -> None:
    with port_of_another_job() as port:
        ranks(here=[0], port=port)


def stale_lock() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder, "lock")
        lock.touch()
        os.utime(lock, (time.time() - 3600,) * 2)
        before = os.environ.get("TORCH_EXTENSIONS_DIR")
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        try:
            surroundings()
        finally:
            os.environ.pop("TORCH_EXTENSIONS_DIR")
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def by_ssh(host: str, port: int = 22) -> None:
    hostfile(f"{host} slots=1\n", lambda path: check_hosts(path, port))


def elsewhere(address: str) -> None:
    """Rank 1 is on another machine and gives this address."""
    ranks(change={"host": "node-b", "address": address})


def section(text: dict[str, Any]) -> LocalParallelConfig:
    return local_parallel({"local_parallel": text})


# what is wrong -> (how it is made, a part of what must be said)
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "hostfile missing": (
        lambda: read_hostfile("/nowhere/hostfile"),
        "cannot read the hostfile /nowhere/hostfile",
    ),
    "hostfile empty": (lambda: hostfile("# nobody\n"), "names no host"),
    "hostfile line without slots": (lambda: hostfile("node-a 8\n"), "line 1"),
    "host twice in the hostfile": (
        lambda: hostfile("node-a slots=2\nnode-b slots=2\nnode-a slots=2\n"),
        "names node-a again",
    ),
    "launcher told a hostfile that is missing": (
        launcher_without_its_hostfile,
        "it started on this machine alone",
    ),
    "host name without an address": (lambda: by_ssh("no-such-host.invalid"), "has no address"),
    "no ssh server on a host": (lambda: by_ssh("127.0.0.1", 1), "failed"),
    "host does not answer": (lambda: by_ssh(NOBODY), NOBODY),
    "network interface that does not exist": (
        lambda: surroundings(GLOO_SOCKET_IFNAME="eth77"),
        "the interfaces are",
    ),
    "master address is the loopback": (
        lambda: surroundings(MASTER_ADDR="127.0.0.1", WORLD_SIZE="4", LOCAL_SIZE="2"),
        "pass --master_addr",
    ),
    "host name resolves to the loopback": (
        lambda: elsewhere("127.0.1.1"),
        "set GLOO_SOCKET_IFNAME",
    ),
    "address of the wrong network, or a firewall": (lambda: elsewhere(NOBODY), "does not answer"),
    "port in use": (port_in_use, "is in use"),
    "a rank missing": (lambda: ranks(3, here=[0, 1]), "did not come within"),
    "rank 0 missing": (lambda: ranks(2, here=[1]), "cannot reach rank 0"),
    "other package versions": (
        lambda: ranks(change={"versions": {"torch": "2.12.0"}}),
        "in its versions: torch 2.12.0",
    ),
    "other code": (lambda: ranks(change={"code": "c41e7f09ab52"}), "in its code"),
    "other config": (lambda: ranks(change={"config": "e83a5b6d1f70"}), "in its config"),
    "other data": (lambda: ranks(change={"data": "58c2d94e07bf"}), "in its data"),
    "data missing on a node": (
        lambda: ranks(change=cluster.own_facts(data="/nowhere/data")),
        "/nowhere/data is no prepared data folder (No such file or directory)",
    ),
    "other number of ranks": (
        lambda: ranks(change={"world_size": 4}),
        "in its world size: 4 instead of 2",
    ),
    "build lock left behind": (stale_lock, "was left behind"),
    "stages do not divide the ranks": (
        lambda: num_stages_and_replicas(section({}), 16, 3),
        "cannot be divided into 3 stages",
    ),
    "misspelt layout": (
        lambda: section({"layout": {"stage": "across_nodes"}}),
        "did you mean 'stages'?",
    ),
}


def make(name: str) -> tuple[str, float]:
    """(what is said, seconds). Raises AssertionError when nothing is."""
    began = time.monotonic()
    try:
        CASES[name][0]()
    except (RuntimeError, ValueError) as error:
        return str(error), time.monotonic() - began
    raise AssertionError(f"{name}: nothing was said")


def main() -> int:
    print("| what is wrong | what is said | seconds |\n|---|---|---|")
    for name in sys.argv[1:] or CASES:
        said, seconds = make(name)
        print(f"| {name} | {said} | {seconds:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
