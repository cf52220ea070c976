"""What a rank can find out alone before it meets the others: its hostfile, its network interfaces,
its address, stale locks."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from ds_local.errors import ClusterError
from ds_local.links.staging import ranks_here

STALE_LOCK_SECONDS = 600.0


def check_surroundings(
    environment: Mapping[str, str] = os.environ, parent: int | None = None
) -> None:
    """What a rank can find out alone, in no time.

    Args:
        parent: the process that may be a launcher, or have one above it; default this one's parent.

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
            f"{where}: the launcher was given --hostfile {missing}, which does not exist, so it started on this machine alone; "
            "give the path of the hostfile"
        )
    interfaces = [name for _, name in socket.if_nameindex()]
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(key, "").removeprefix("=").removeprefix("^").split(",")[0]
        if wanted and not any(name.startswith(wanted) for name in interfaces):
            raise ClusterError(
                f"{where}: {key} is {environment[key]} but the interfaces are {', '.join(interfaces)}; set it to one of these"
            )
    master, ranks = environment.get("MASTER_ADDR", ""), int(environment.get("WORLD_SIZE", "1"))
    here = ranks_here(environment, ranks)
    if here < ranks and (master == "localhost" or master.startswith("127.")):
        raise ClusterError(
            f"{where}: the master address is {master}, but {ranks - here} of the {ranks} ranks are on other machines; "
            "pass --master_addr with an address of rank 0's machine that they can reach"
        )
    lock = stale_lock()
    if lock is not None:
        raise ClusterError(
            f"{where}: {lock} was left behind by a build that was killed, and builds wait for it without end; remove it"
        )


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


def stale_lock() -> Path | None:
    """A lock of torch's extension builder that nobody can be holding any more."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in Path(folder).glob("**/lock"):
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
