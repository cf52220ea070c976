"""A process that has imported everything and forks ranks of real runs: a start costs a fraction of
a second.

    python tests/faults/fork_server.py SOCKET        (see `fork_client`, which speaks to it)

It lives as long as its standard input is open, the jobs of a connection as long as that is. A job is
a line of JSON: {"folder", "script", "argv", "ranks", "env", "cwd", "hooks", "unloads"}.
For each job a process is forked that stands for the launcher; it forks the ranks and notes their
ends:

    server -> launcher (leads a process group) -> rank 0, rank 1, ...

A rank runs the script as `python SCRIPT ARGV` would, as `__main__`, with the environment that a
launcher sets, and ends as any Python process does; without "unloads" it leaves out one part of that,
see `end`. In the job's folder lie pids.json, rank-N.txt
(what it said) and rank-N.status (exit code; negative: the signal that ended it). Nothing here may
start a thread before a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "scripts"
SIZES = (64, 320)  # of vocabularies: of `jobs.build`, of `launch.write_inputs`


def import_everything() -> None:
    """All of the package and the heavy packages below it, wherever its modules lie."""
    import ds_local

    for module in pkgutil.walk_packages(ds_local.__path__, "ds_local."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # and what they import at their first use
    import deepspeed
    import torch
    from matplotlib.backends import backend_agg  # noqa: F401

    from ds_local.model import families

    _ = deepspeed.ops.__compatible_ops__
    sys.path.insert(1, str(HERE.parent))
    models = importlib.import_module("reference")
    sys.path.remove(str(HERE.parent))
    for vocab_size in SIZES:  # the start check, which every rank of nearly every run would make
        families.load_model_config({**models.GPT2, "vocab_size": vocab_size})
    torch.set_num_threads(1)


def threads() -> list[str]:
    """Names of this process's threads but the first; the allocator's own is used to forks."""
    names = [
        Path(f"/proc/self/task/{task}/comm").read_text().strip()
        for task in os.listdir("/proc/self/task")
    ]
    return [name for name in names[1:] if name != "jemalloc_bg_thd"]


def main() -> None:
    gc.disable()  # a second of CPU while imports come
    import_everything()
    if threads():
        raise RuntimeError(f"cannot fork with threads about: {threads()}")
    gc.collect()
    gc.freeze()  # forked processes share these pages as long as nobody writes to them
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers leave no zombies
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    launchers: dict[Any, list[int]] = {}  # of each connection
    waiting = selectors.DefaultSelector()
    for source in (listener, sys.stdin):
        waiting.register(source, selectors.EVENT_READ)
    while True:
        for source in [key.fileobj for key, _ in waiting.select()]:
            if source is listener:
                connection = listener.accept()[0]
                launchers[connection] = []
                waiting.register(connection, selectors.EVENT_READ)
            elif source is sys.stdin:  # nobody writes to it: it is closed
                end_all([pid for pids in launchers.values() for pid in pids])
                return
            elif not (line := read_line(source)):  # whoever asked for them is gone
                waiting.unregister(source)
                end_all(launchers.pop(source))
                source.close()
            else:
                pid = os.fork()
                if pid == 0:
                    for one in (waiting, listener, *launchers):
                        one.close()
                    launch(json.loads(line))
                    return
                launchers[source].append(pid)


def read_line(connection: socket.socket) -> bytes:
    """Empty: the other side has closed it."""
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            return b""
        line += part
    return line


def end_all(launchers: list[int]) -> None:
    for pid in launchers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def launch(job: dict[str, Any]) -> None:
    """Returns on a rank, with its script run; never on the launcher."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    folder = Path(job["folder"])
    ranks: dict[int, int] = {}
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            return run_rank(job, rank, folder)
        ranks[pid] = rank
    write(folder / "pids.json", json.dumps([os.getpid(), *ranks]))
    while ranks:
        pid, status = os.wait()
        write(folder / f"rank-{ranks.pop(pid)}.status", str(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def write(path: Path, text: str) -> None:
    """Whole or not at all: somebody is waiting for the file."""
    scratch = path.with_suffix(".new")
    scratch.write_text(text)
    scratch.rename(path)


def run_rank(job: dict[str, Any], rank: int, folder: Path) -> None:
    output = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if job["ranks"] > 1 or job["env"].get("MASTER_PORT"):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_SIZE=str(job["ranks"]),
            LOCAL_WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1",
        )  # fmt: skip
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    # ranks look for a launcher above them: the process that stands for it goes by this file's name
    signals = importlib.import_module("ds_local.training.signals")
    signals.LAUNCHERS = (*signals.LAUNCHERS, Path(__file__).name)
    script = SCRIPTS / job["script"]
    sys.argv = [str(script), *job["argv"]]
    sys.path[0] = str(script.parent)
    for name, arguments in job["hooks"].get(str(rank), []):
        sys.path.insert(1, str(HERE))
        getattr(importlib.import_module("hooks"), name)(**arguments)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if ended.code or job["unloads"]:
            raise
    if not job["unloads"]:
        end()


def end() -> NoReturn:
    """The end of a Python process whose script has come to its own: threads that are waited for, what
    was registered for the end, destructors of what the script has made.

    Modules are not taken apart: that writes to every page that is shared with the server, which
    takes longer than most runs here.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
