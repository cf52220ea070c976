"""What a rank can find out alone before it meets the others: its launcher, its hostfile, its
network interfaces, its address, stale locks."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from ds_local.errors import ClusterError
from ds_local.links.staging import ranks_here

STALE_LOCK_SECONDS = 600.0
_BUILT = ("adam", "lamb", "lion", "adagrad")  # optimizers whose updates are compiled
# what other launchers call RANK, WORLD_SIZE and LOCAL_RANK
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    _SRUN,
)


def complete_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Fill in what torch and DeepSpeed ask the environment for. A process that no launcher started
    is the only one: `python script.py`, a notebook.

    Raises:
        ClusterError: when a launcher started several processes and does not say which is which.
    """
    _check_accelerate(environment)
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not any(key in environment for key in own[:2]):
        started = (names for names in _LAUNCHERS if environment.get(names[1], "1") != "1")
        names = next(started, None)
        found = ("0", "1", None) if names is None else map(environment.get, names)
        environment.update({k: v for k, v in zip(own, found, strict=True) if v is not None})
    try:
        rank, world_size = (int(environment.get(key, "")) for key in own[:2])
        if not 0 <= rank < world_size:
            raise ValueError
    except ValueError:
        given = ", ".join(f"{key} is {environment.get(key) or 'not set'}" for key in own[:2])
        raise ClusterError(
            f"{given} in the environment; unset both to run one process, or start with torchrun or "
            "the deepspeed launcher"
        ) from None
    if world_size == 1:
        environment.setdefault("LOCAL_RANK", "0")
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(free_port()))
    missing = [k for k in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(k)]
    by_mpi = any(names[1] in environment for names in _LAUNCHERS if names is not _SRUN)
    if missing and not (by_mpi and find_spec("mpi4py")):  # DeepSpeed would ask MPI
        raise ClusterError(
            f"rank {rank} of {world_size} finds no {' and no '.join(missing)} in its environment; "
            "set them on all ranks, or start with torchrun or the deepspeed launcher"
        )


def _check_accelerate(environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes N` sets some variables for N processes and starts
    one."""
    names = ("WORLD_SIZE", *(names[1] for names in _LAUNCHERS))
    if (
        "ACCELERATE_USE_CPU" in environment
        and "MASTER_ADDR" in environment
        and not any(name in environment for name in names)
    ):
        raise ClusterError(
            "accelerate launch started one process only, as it does with --cpu; replace --cpu by "
            "--multi_gpu, which needs no GPU, or use torchrun or the deepspeed launcher"
        )


def free_port() -> int:
    """One that nobody listens at now. It lies below those that systems give to connections, any of
    which might take it before it is used."""
    for port in random.SystemRandom().sample(range(20000, 32768), 1000):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise ClusterError("none of 1,000 ports from 20000 to 32767 is free on this machine")


def check_surroundings(
    environment: Mapping[str, str] = os.environ,
    parent: int | None = None,
    builds: str | None = None,
) -> None:
    """What a rank can find out alone, in no time.

    Args:
        parent: the process that may be a launcher, or have one above it; default this one's parent.
        builds: as `builds_of` says; None: that is not known.

    Raises:
        ClusterError: no hostfile where the launcher was told one, a network interface that does not
            exist, a master address that other machines cannot reach.
    """
    where = f"on {socket.gethostname()} (rank {environment.get('RANK', '0')})"
    missing = next(
        (
            path
            for path in _hostfiles_of_launchers(parent or os.getppid())
            if not Path(path).is_file()
        ),
        None,
    )
    if missing is not None:
        raise ClusterError(
            f"{where}: the launcher was given --hostfile {missing}, which does not exist, so it "
            "started on this machine alone; give the path of the hostfile"
        )
    interfaces = [name for _, name in socket.if_nameindex()]
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(key, "").removeprefix("=").removeprefix("^").split(",")[0]
        if wanted and not any(name.startswith(wanted) for name in interfaces):
            raise ClusterError(
                f"{where}: {key} is {environment[key]} but the interfaces are "
                f"{', '.join(interfaces)}; set it to one of these"
            )
    master, ranks = environment.get("MASTER_ADDR", ""), int(environment.get("WORLD_SIZE", "1"))
    here = ranks_here(environment, ranks)
    if here < ranks and (master == "localhost" or master.startswith("127.")):
        raise ClusterError(
            f"{where}: the master address is {master}, but {ranks - here} of the {ranks} ranks are "
            "on other machines; pass --master_addr with an address of rank 0's machine that they "
            "can reach"
        )
    check_builds(builds)


def check_builds(builds: str | None = None) -> None:
    """Raises ClusterError for a lock that a build of this start would wait for without end."""
    lock = stale_lock(builds)
    if lock is not None:
        raise ClusterError(
            f"on {socket.gethostname()} (rank {os.environ.get('RANK', '0')}): {lock} was left "
            "behind by a build that was killed, and builds wait for it without end; remove it"
        )


def builds_of(config: Mapping[str, Any]) -> str:
    """What DeepSpeed may have to build for the optimizer of its config; "" for nothing."""
    optimizer = config.get("optimizer") or {}
    own = str(optimizer.get("type", "")).lower()
    if (optimizer.get("params") or {}).get("torch_adam"):
        return ""
    return next((name for name in _BUILT if name in own), "")


def _hostfiles_of_launchers(process: int) -> list[str]:
    """The --hostfile arguments of the DeepSpeed launchers from this process up (Linux; elsewhere
    none is found)."""
    found: list[str] = []
    for _ in range(6):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return found
        if any(word.endswith(("deepspeed", "deepspeed/launcher/runner.py")) for word in words[:3]):
            found += [after for word, after in pairwise(words) if word in ("--hostfile", "-H")]
            found += [word.partition("=")[2] for word in words if word.startswith("--hostfile=")]
    return found


def stale_lock(builds: str | None = None) -> Path | None:
    """A lock of torch's extension builder that nobody can be holding any more, of what is built.

    Args:
        builds: an end of names of DeepSpeed's ops; None: any but the one that is never built here.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in Path(folder).glob("**/lock"):
        name = lock.parent.name
        if name == "deepspeed_shm_comm" or (
            builds is not None and not name.endswith(builds or "/")
        ):
            continue
        if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS:
            return lock
    return None


def own_address() -> str:
    """The address at which other ranks will look for this one: that of GLOO_SOCKET_IFNAME, or of
    the host's name."""
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").removeprefix("=").split(",")[0]
    name = next(
        (name for _, name in socket.if_nameindex() if wanted and name.startswith(wanted)), ""
    )
    if name:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                packed = fcntl.ioctl(
                    s.fileno(), 0x8915, struct.pack("256s", name.encode()[:15])
                )  # SIOCGIFADDR
        except OSError as error:
            raise ClusterError(
                f"GLOO_SOCKET_IFNAME names {name}, which has no address: {error.strerror}"
            ) from error
        return socket.inet_ntoa(packed[20:24])
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"  # what gloo falls back to


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Hosts and slots of a DeepSpeed hostfile.

    Raises:
        ClusterError: when it is missing or a line is not `HOST slots=N`.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ClusterError(
            f"cannot read the hostfile {path}: {error.strerror}; write one of `HOST slots=N` lines"
        ) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if (
            len(words) != 2
            or not words[1].startswith("slots=")
            or not words[1][6:].isdigit()
            or int(words[1][6:]) < 1
        ):
            raise ClusterError(f"line {number} of {path} is {line!r}; write `HOST slots=N`")
        if words[0] in hosts:
            raise ClusterError(
                f"line {number} of {path} names {words[0]} again; keep one line with all its slots"
            )
        hosts[words[0]] = int(words[1][6:])
    if not hosts:
        raise ClusterError(f"{path} names no host; write a line `HOST slots=N` for each machine")
    return hosts
