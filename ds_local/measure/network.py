"""A network namespace for each rank, and links of a chosen speed between them.

A rank that calls `enter` gets a network of its own with one interface, joined to the others by a
bridge in the namespace of the process that started it. `shape_this_rank` limits what leaves through
that interface. All of it disappears with the processes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

from ds_local.measure.ranks import Pool

INSIDE = "DS_LOCAL_BENCH_NAMESPACE"
MTU = 9000
_NEW_NETWORK = 0x40000000
_ETHTOOL, _SET_TX_CHECKSUM = 0x8946, 0x17
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
    probe = (
        "ip link add veth0 type veth peer name veth1 && ip link add br0 type bridge && "
        "tc qdisc add dev veth0 root tbf rate 1mbit burst 64kb latency 1s"
    )
    try:
        done = subprocess.run(
            ["unshare", "-Urnm", "sh", "-c", probe], check=False, capture_output=True, text=True
        )
    except OSError as error:
        return f"the command unshare cannot be run ({error.strerror})"
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def rerun_inside() -> None:
    """Start this very command again in a namespace where it may make networks; does not return."""
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", "-Urnm", sys.executable, *sys.argv])


def pool(bridge: bool = True) -> Pool:
    """Ranks in namespaces, joined by a bridge or (by a `relay.Relay`) not yet."""
    _sh("ip link set lo up")
    if bridge:
        _sh("ip link add br0 type bridge && ip link set br0 up")
    return Pool(partial(enter, outer=interfaces(bridge), bridge=bridge), address(0))


def interfaces(bridge: bool) -> str:
    """Stem of the names at the parent's end. The two kinds differ: networks of ranks that ended may
    linger for a while."""
    return "bridged" if bridge else "relayed"


def enter(rank: int, outer: str, bridge: bool) -> None:
    """Give this process a network of its own with an interface eth0, whose other end is `outer` and
    the rank at the parent's.

    Call it before any socket is opened.
    """
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare")
    other = f"{outer}{rank}"
    _sh(f"ip link add eth0 mtu {MTU} type veth peer name {other} mtu {MTU} netns {parent}")
    _compute_checksums("eth0")
    _sh(f"nsenter -t {parent} -n ip link set {other} {'master br0' if bridge else ''} up")
    _sh(f"ip link set lo up; ip addr add {address(rank)}/24 dev eth0; ip link set eth0 up")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def _compute_checksums(interface: str) -> None:
    """Between virtual interfaces the kernel leaves checksums out; what a relay reads must have
    them."""
    value = ctypes.create_string_buffer(struct.pack("II", _SET_TX_CHECKSUM, 0))
    request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _ETHTOOL, request)


def shape_this_rank(shape: Shape) -> None:
    """Limit what this rank sends. Nothing happens outside a namespace."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        return
    if shape.bits_per_second:
        rate = f"{shape.bits_per_second / 1000:.0f}kbit"
        _sh(f"tc qdisc replace dev eth0 root tbf rate {rate} burst 64kb latency 400ms")
    else:
        subprocess.run("tc qdisc del dev eth0 root", shell=True, check=False, capture_output=True)
