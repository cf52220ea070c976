"""Which process is this, and does it still live? A number alone says neither: numbers are used
again, and other hosts and containers have their own.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

import psutil


class Process(NamedTuple):
    """A process among all that ever ran."""

    host: str
    place: str  # boot and pid namespace of the host: where the number counts
    pid: int
    started: str  # on the clock of that place

    @classmethod
    def own(cls) -> Process:
        return cls(socket.gethostname(), _place(), os.getpid(), _started(os.getpid()) or "")

    def is_gone(self) -> bool | None:
        """Has it ended? None where that cannot be seen from here."""
        if (self.host, self.place) != (socket.gethostname(), _place()):
            return None
        return _started(self.pid) != self.started


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""  # no Linux: the host's name must do


def _started(pid: int) -> str | None:
    """When the process began; None when none by that number runs, or it only waits to be buried."""
    try:
        # its name, in brackets, may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        return None if Path("/proc/self").exists() else _started_elsewhere(pid)


def _started_elsewhere(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
