"""Real runs of scripts/*.py, started by the fork server and watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_local.cluster.surroundings import free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARED = "DS_LOCAL_FORK_SERVER"  # the address of one that serves several processes
START_SECONDS = 120
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}  # fmt: skip
_BY_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def environment() -> dict[str, str]:
    """Of a process that no launcher started."""
    kept = {name: value for name, value in os.environ.items() if name not in _BY_LAUNCHER}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    binaries = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    # a lock that another job left in the common folder must not stop ours
    own = {"TORCH_EXTENSIONS_DIR": str(ROOT / "runs" / "faults" / "extensions")}
    return kept | _ENVIRONMENT | own | {"PYTHONPATH": ":".join(paths), "PATH": binaries}


def wait_for(condition: Callable[[], Any], seconds: float, interval: float = 0.01) -> Any:
    """What `condition` gives as soon as it is true, or at last."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(interval)
    return found


def is_alive(pid: int) -> bool:
    """Does the process run? One that ended and that nobody has asked about does not."""
    return state_of(pid) not in "ZX"


def state_of(pid: int) -> str:
    """One letter, as in /proc; X: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


class Run:
    """The ranks of one start of a script.

    Attributes:
        launcher: process that stands for the launcher.
        pids: of the ranks.
        began: when it was asked for, `time.monotonic()`.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.began = time.monotonic()
        self.ended = 0.0
        if not wait_for((folder / "pids.json").exists, 30):
            raise RuntimeError("the fork server does not start ranks any more")
        self.launcher, *self.pids = json.loads((folder / "pids.json").read_text())

    def status(self, rank: int) -> int | None:
        """Exit code, the negative number of the signal that ended it, or None: it runs, or its
        launcher was killed."""
        path = self.folder / f"rank-{rank}.status"
        return int(path.read_text()) if path.exists() else None

    def statuses(self) -> list[int | None]:
        return [self.status(rank) for rank in range(len(self.pids))]

    def output(self, rank: int) -> str:
        path = self.folder / f"rank-{rank}.txt"
        if not path.exists():  # ended before it was born: another had refused already
            return ""
        return path.read_text(errors="replace").replace("\r", "\n")

    def outputs(self) -> str:
        return "".join(self.output(rank) for rank in range(len(self.pids)))

    def alive(self) -> list[int]:
        """Ranks that still run."""
        return [
            rank
            for rank, pid in enumerate(self.pids)
            if self.status(rank) is None and is_alive(pid)
        ]

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to all of them."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def signal_launcher(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.launcher, number)

    def is_stopped(self, rank: int) -> bool:
        """By SIGSTOP."""
        return state_of(self.pids[rank]) == "T"

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> bool:
        """Have all these ranks ended within so many seconds?"""
        wanted = set(range(len(self.pids)) if ranks is None else ranks)
        done = wait_for(lambda: not wanted & set(self.alive()), seconds)
        if done and is_alive(self.launcher):  # it notes the last end
            wait_for(lambda: None not in map(self.status, wanted), 5)
        self.ended = self.ended or time.monotonic()
        return done

    def wait_as_launchers_do(self, seconds: float) -> bool:
        """Wait until all have ended, or one has failed: then the others are told to end, and killed
        at last.

        `ended` is when the first one failed. Has everything ended by itself or been told to, in
        time?
        """
        ranks = range(len(self.pids))
        wait_for(lambda: any(map(self.status, ranks)) or not self.alive(), seconds)
        self.ended = time.monotonic()
        if not any(map(self.status, ranks)):
            return self.wait(5)
        self.signal(signal.SIGTERM)
        return self.wait(30)

    def left(self) -> list[int]:
        """Processes of the run's group that still run: ranks, and whatever they started."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if (
                    int(fields[2]) == self.launcher
                    and fields[0] not in "ZX"
                    and int(entry) != self.launcher
                ):
                    found.append(int(entry))
        return found

    def close(self) -> list[int]:
        """Kill what is left of the run; returns what was."""
        left = self.left()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher, signal.SIGKILL)
        return left


class Launched:
    """A run started by a real launcher, with all it says in one file; seen from outside as a `Run`
    is."""

    def __init__(self, folder: Path, launcher: str, argv: Sequence[str], ranks: int) -> None:
        self.began, self.ended = time.monotonic(), 0.0
        self._ranks, self._output = ranks, folder / "launcher.txt"
        port = free_port()
        start = {
            "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port)],
            "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(port)],
        }[launcher]  # fmt: skip
        binary = Path(sys.executable).parent / start[0]
        self._mark = f"MASTER_PORT={port}".encode()
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [str(binary), *start[1:], str(ROOT / "scripts" / "train.py"), *argv], env=environment(), cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def pids(self) -> dict[int, int]:
        """Rank -> process, of those that live."""
        found = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                ranks = [value for value in variables if value.startswith(b"RANK=")]
                if self._mark in variables and ranks and is_alive(int(entry)):
                    found.setdefault(int(ranks[0][5:]), int(entry))
        return found

    def statuses(self) -> list[int | None]:
        """Of the launcher."""
        return [self._process.poll()]

    def outputs(self) -> str:
        return self._output.read_text(errors="replace").replace("\r", "\n")

    def alive(self) -> list[int]:
        """Ranks that live; -1 stands for the launcher."""
        return [*([-1] if self._process.poll() is None else []), *self.pids()]

    def signal(self, number: int, rank: int | None = None) -> None:
        for which, pid in self.pids().items():
            if rank in (None, which):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def signal_launcher(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> bool:
        done = wait_for(lambda: not self.alive(), seconds, 0.1)
        self.ended = self.ended or time.monotonic()
        return bool(done)

    def close(self) -> list[int]:
        """Kill what is left; returns what was."""
        left = [*self.pids().values()]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return left


class ServerProcess:
    """The process of a fork server, for whoever knows its address."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ds_local-fork-server-")
        self.address = str(Path(self._folder.name) / "socket")
        with (Path(self._folder.name) / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "fork_server.py"), self.address], env=environment(), cwd=ROOT,
                stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        self._process.communicate(timeout=30)
        self._folder.cleanup()


class Server:
    """A fork server, as long as the `with` block lasts: the one whose address the environment holds,
    else one of its own.

    Args:
        unloads: a rank that has done its work takes apart what was imported, as Python does; without,
            it ends 0.4 s of a core earlier.
    """

    def __init__(self, work: Path, unloads: bool = True) -> None:
        self.work, self.unloads = work, unloads
        self._count = 0
        work.mkdir(parents=True, exist_ok=True)
        self._own = None if SHARED in os.environ else ServerProcess()
        self._address = self._own.address if self._own else os.environ[SHARED]
        self._connection: socket.socket | None = None
        self._runs: list[Run] = []

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.close()
        if self._connection:
            self._connection.close()
        if self._own:
            self._own.close()

    def start(
        self, script: str, argv: Sequence[str], ranks: int = 1, env: Mapping[str, str] | None = None,
        hooks: Mapping[int, Sequence[tuple[str, Mapping[str, Any]]]] | None = None, cwd: Path = ROOT,
        unloads: bool | None = None,
    ) -> Run:  # fmt: skip
        """Start scripts/`script`, or a script with an absolute path, on so many ranks.

        Args:
            cwd: their working directory.
            hooks: rank -> functions of hooks.py and their arguments, called before the script.
            unloads: otherwise than the server's own.
        """
        if self._connection is None:
            self._connection = self._connect()
        self._count += 1
        folder = self.work / f"job-{self._count:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        together = {"MASTER_PORT": str(free_port())} if ranks > 1 else {}
        job = {
            "folder": str(folder), "script": script, "argv": list(argv), "ranks": ranks, "env": together | dict(env or {}), "cwd": str(cwd),
            "hooks": {str(rank): list(calls) for rank, calls in (hooks or {}).items()},
            "unloads": self.unloads if unloads is None else unloads,
        }  # fmt: skip
        self._connection.sendall(json.dumps(job).encode() + b"\n")
        run = Run(folder, ranks)
        self._runs.append(run)
        return run

    def finish(self, script: str, argv: Sequence[str], seconds: float = 60, **how: Any) -> Run:
        """Start, and wait for the end; what has not ended by then is killed, which its statuses
        show."""
        run = self.start(script, argv, **how)
        run.wait(seconds)
        run.close()
        run.wait(5)
        return run

    def _connect(self) -> socket.socket:
        """As soon as it has imported all."""
        connection = socket.socket(socket.AF_UNIX)

        def attempt() -> socket.socket | bool:
            if connection.connect_ex(self._address) == 0:
                return connection
            return self._own is not None and self._own.has_ended

        if wait_for(attempt, START_SECONDS, 0.05) is connection:
            return connection
        log = Path(self._address).with_name("log.txt")
        raise RuntimeError(f"the fork server did not start: {log.read_text()}")
