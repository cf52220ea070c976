"""Two hosts on one machine: network namespaces with a name, an address and an ssh server each,
joined by a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "cable0"
SSH_PORT = 2222


def why_not() -> str:
    """Why two hosts cannot be had here; "" when they can."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "two hosts need root and iproute2"
    probe = subprocess.run(
        ["ip", "netns", "add", f"probe-{os.getpid()}"], check=False, capture_output=True, text=True
    )
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    _run("ip", "netns", "del", f"probe-{os.getpid()}")
    return ""


def why_no_ssh() -> str:
    missing = [
        name
        for name in ("ssh", "sshd", "pdsh", "ssh-keygen")
        if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    return f"the launcher's own way to other hosts needs {', '.join(missing)}" if missing else ""


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class TwoHosts:
    """A context: the hosts are there inside it, and everything started on them is gone after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = [f"{name}-{os.getpid()}" for name in NAMES]
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> TwoHosts:
        for namespace in self.namespaces:
            _run("ip", "netns", "add", namespace)
        a, b = self.namespaces
        _run(
            "ip",
            "-n",
            a,
            "link",
            "add",
            INTERFACE,
            "type",
            "veth",
            "peer",
            "name",
            INTERFACE,
            "netns",
            b,
        )
        for namespace, address in zip(self.namespaces, ADDRESSES, strict=True):
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _run("ip", "-n", namespace, "link", "set", device, "up")
        (self.folder / "hostfile").write_text(
            "".join(f"{address} slots=1\n" for address in ADDRESSES)
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for namespace in self.namespaces:
            for pid in _run("ip", "netns", "pids", namespace).split():
                subprocess.run(["kill", "-9", pid], check=False)
            _run("ip", "netns", "del", namespace)

    def start(self, host: int, words: list[str], **environment: str) -> subprocess.Popen:
        """A command on a host; its output goes to a file of the folder."""
        name = f'hostname {NAMES[host]} && exec "$@"'
        process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.namespaces[host],
                "unshare",
                "--uts",
                "sh",
                "-c",
                name,
                "sh",
                *words,
            ],
            env=os.environ | environment,
            cwd=self.folder,
            stdout=self.log(host).open("w"),
            stderr=subprocess.STDOUT,
        )
        self._processes.append(process)
        return process

    def log(self, host: int) -> Path:
        return self.folder / f"{NAMES[host]}.log"

    def outputs(self) -> list[str]:
        return [self.log(host).read_text() for host in range(2)]

    def processes_left(self) -> list[str]:
        return [
            pid
            for namespace in self.namespaces
            for pid in _run("ip", "netns", "pids", namespace).split()
        ]

    def cut(self) -> None:
        """Unplug the cable: nothing arrives any more, nobody is told."""
        _run("ip", "-n", self.namespaces[0], "link", "set", INTERFACE, "down")

    def plug_in(self) -> None:
        """Put the cable back."""
        _run("ip", "-n", self.namespaces[0], "link", "set", INTERFACE, "up")

    def limit(self, megabits: float) -> None:
        """Both directions."""
        for namespace in self.namespaces:
            _run(
                "tc",
                "-n",
                namespace,
                "qdisc",
                "replace",
                "dev",
                INTERFACE,
                "root",
                "tbf",
                "rate",
                f"{megabits}mbit",
                "burst",
                "64kb",
                "latency",
                "400ms",
            )

    def serve_ssh(self, environment: dict[str, str]) -> dict[str, str]:
        """An ssh server on each host, and what a client's environment needs to log in."""
        keys, bin_ = self.folder / "keys", self.folder / "bin"
        for folder in (keys, bin_, Path("/run/sshd")):
            folder.mkdir(exist_ok=True)
        for name in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name))
        variables = " ".join(f'"{key}={value}"' for key, value in environment.items())
        (keys / "config").write_text(
            f"Port {SSH_PORT}\nHostKey {keys / 'host'}\nAuthorizedKeysFile "
            f"{keys / 'user.pub'}\nStrictModes no\nPidFile none\n"
            f"UsePAM no\nPermitRootLogin yes\nSetEnv {variables}\n"
        )
        (bin_ / "ssh").write_text(
            f"#!/bin/sh\nexec {shutil.which('ssh')} -p {SSH_PORT} -i {keys / 'user'} -o "
            f"StrictHostKeyChecking=no "
            '-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
        )
        (bin_ / "ssh").chmod(0o755)
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        for host in range(2):
            self.start(host, [str(sshd), "-D", "-e", "-f", str(keys / "config")])
        time.sleep(1)
        return {"PATH": f"{bin_}:{os.environ['PATH']}"}
