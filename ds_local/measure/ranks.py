"""Real gloo processes on this machine, for tests and benchmarks: `Pool.run` runs a module-level
function on every rank.

Importing DeepSpeed costs seconds, so ranks are forked from one process that has imported it, and
stay alive between calls; each call gets a process group of its own. A call has a time limit. The
first rank that fails is reported with its traceback, a rank that takes too long with the line it is
at.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from torch import distributed as dist

from ds_local.cluster.surroundings import free_port
from ds_local.errors import DsLocalError

TIMEOUT_SECONDS = 120
_SAY_WHERE = signal.SIGRTMIN + 1  # a rank that gets it writes its stacks to its file


class RankError(DsLocalError, RuntimeError):
    """A rank failed, died or took too long; the message holds its traceback, or where it stands."""


def _serve(
    rank: int,
    jobs: Any,
    results: Any,
    prepare: Callable[[int], None] | None,
    address: str,
    stacks: Path,
) -> None:
    multiprocessing.current_process().daemon = False  # so that a DataLoader may have workers
    # which start as they do under a launcher, not each with imports of its own
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank))
    faulthandler.register(_SAY_WHERE, file=stacks.open("w"))
    if prepare is not None:
        prepare(rank)
    while True:
        job = jobs.get()
        if job is None:
            return
        number, function, world_size, port, args, kwargs = job
        try:
            os.environ.update(
                WORLD_SIZE=str(world_size),
                LOCAL_SIZE=str(world_size),
                MASTER_ADDR=address,
                MASTER_PORT=str(port),
            )
            results.put((number, rank, True, _run(function, args, kwargs)))
        except BaseException:
            results.put((number, rank, False, traceback.format_exc()))
        # every process group has a thread that wakes a hundred times a second, as long as anybody
        # refers to it
        gc.collect()


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from ds_local.engine.process_group import end_processes, start_processes

    with open(os.environ.get("DS_LOCAL_RANKS_LOG", os.devnull), "a") as sink:
        saved = os.dup(1), os.dup(2)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            start_processes()
            dist.barrier()  # who is done at once must not leave while others still connect
            return function(*args, **kwargs)
        finally:
            end_processes()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


class Pool:
    """Ranks that wait for work.

    Args:
        prepare: called with its number on each rank before anything else.
        address: of rank 0, as the ranks see it.
        preload: modules that are imported once, where ranks are forked from one process.
    """

    def __init__(
        self,
        prepare: Callable[[int], None] | None = None,
        address: str = "127.0.0.1",
        preload: Sequence[str] = (),
    ) -> None:
        self._prepare, self._address = prepare, address
        # a process that has looked for CUDA devices cannot be forked
        forks = os.environ.get("DS_ACCELERATOR", "cpu") == "cpu"
        self._context: Any = mp.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(["ds_local.measure.warm", *preload])
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._workers: list[tuple[Any, Any]] = []
        self._results = self._context.Queue()
        self._number = 0

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = TIMEOUT_SECONDS,
        **kwargs: Any,
    ) -> list[Any]:
        """What `function(*args, **kwargs)` returned on each rank. Raises RankError when one failed
        or took too long."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="ds_local-ranks-")
        while len(self._workers) < world_size:
            rank, jobs = len(self._workers), self._context.Queue()
            args_of_rank = (
                rank,
                jobs,
                self._results,
                self._prepare,
                self._address,
                self._stacks(rank),
            )
            process = self._context.Process(target=_serve, args=args_of_rank, daemon=True)
            process.start()
            self._workers.append((process, jobs))
        self._number += 1
        port = free_port()
        for _, jobs in self._workers[:world_size]:
            jobs.put((self._number, function, world_size, port, args, kwargs))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < world_size:
            try:
                number, rank, fine, value = self._results.get(timeout=1.0)
            except queue.Empty:
                missing = sorted(set(range(world_size)) - set(answers))
                dead = [rank for rank in missing if not self._workers[rank][0].is_alive()]
                if not dead and time.monotonic() < deadline:
                    continue
                what = (
                    f"ranks {dead} died"
                    if dead
                    else f"ranks {missing} did not finish within {timeout} s; where they are:\n"
                    + "\n".join(self._where(rank) for rank in missing)
                )
                self.close()
                raise RankError(what) from None
            if number != self._number:
                continue
            if not fine:
                self.close()
                raise RankError(f"rank {rank} failed:\n{value}")
            answers[rank] = value
        return [answers[rank] for rank in range(world_size)]

    def _stacks(self, rank: int) -> Path:
        assert self._folder is not None, "made by run"
        return Path(self._folder.name) / f"rank-{rank}.txt"

    def _where(self, rank: int) -> str:
        """The stacks of a rank's threads, newest call first."""
        os.kill(self._workers[rank][0].pid, _SAY_WHERE)
        path, deadline = self._stacks(rank), time.monotonic() + 5
        while not (text := path.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.05)  # the rest of it
        return f"rank {rank}:\n{path.read_text() or text or 'it does not say'}"

    def close(self) -> None:
        """End the ranks; the next call starts fresh ones."""
        for process, _ in self._workers:
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers, self._results = [], self._context.Queue()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
