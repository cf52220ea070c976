"""A network namespace for each rank, and links of a chosen speed between them.

A rank that calls `enter` gets a network of its own with one interface, joined to the others by a bridge in the namespace of the
process that started it. `shape_this_rank` limits what leaves through that interface. All of it disappears with the processes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass

INSIDE = "DS_LOCAL_BENCH_NAMESPACE"
_NEW_NETWORK = 0x40000000
_SUBNET = "10.77.0"


@dataclass(frozen=True)
class Shape:
    """Of the interface of each rank."""

    bits_per_second: float = 0.0  # 0: no limit
    delay_seconds: float = 0.0  # one way, by the relay


def address(rank: int) -> str:
    return f"{_SUBNET}.{rank + 1}"


def _sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True, text=True)


def refusal() -> str | None:
    """Why this system does not allow namespaces, or None."""
    probe = "ip link add a type veth peer name b && ip link add c type bridge && tc qdisc add dev a root tbf rate 1mbit burst 64kb latency 1s"
    try:
        done = subprocess.run(["unshare", "-Urnm", "sh", "-c", probe], check=False, capture_output=True, text=True)
    except OSError as error:
        return f"the command unshare cannot be run ({error.strerror})"
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def rerun_inside() -> None:
    """Start this very command again in a namespace where it may make networks; does not return."""
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", "-Urnm", sys.executable, *sys.argv])


def make_bridge() -> None:
    _sh("ip link set lo up; ip link add br0 type bridge; ip link set br0 up")


def enter(rank: int) -> None:
    """Give this process a network of its own. Call it before any socket is opened."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare")
    _sh(f"ip link add eth0 type veth peer name rank{rank} netns {parent}")
    _sh(f"nsenter -t {parent} -n ip link set rank{rank} master br0 up")
    _sh(f"ip link set lo up; ip addr add {address(rank)}/24 dev eth0; ip link set eth0 up")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def shape_this_rank(shape: Shape) -> None:
    """Limit what this rank sends. Nothing happens outside a namespace."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        return
    if shape.bits_per_second:
        rate = f"{shape.bits_per_second / 1000:.0f}kbit"
        _sh(f"tc qdisc replace dev eth0 root tbf rate {rate} burst 64kb latency 400ms")
    else:
        subprocess.run("tc qdisc del dev eth0 root", shell=True, check=False, capture_output=True)
