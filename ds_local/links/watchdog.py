"""Says who everybody waits for when a run stops moving, and keeps a log of every rank.

Each rank's watchdog looks at its links now and then. A wait beyond `link.warn_seconds` is posted
where all ranks can read it; rank 0 puts the posts together and names the stages that are waited for
but wait for nobody. Nothing is ended here: that is what `link.timeout_seconds` is for.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_local.links.notices import change_notice, read_notice

LOG = logging.getLogger("ds_local")


class Wait(NamedTuple):
    """A rank that has waited long."""

    stage: int
    rank: int
    for_stage: int
    for_rank: int
    purpose: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"stage {self.stage} (rank {self.rank}) has waited {self.seconds:.0f} s for stage {self.for_stage} "
            f"(rank {self.for_rank}) {self.purpose}"
        )


def longest_wait(stage: int, rank: int, links: Iterable[Any], now: float) -> Wait | None:
    """What a rank waits for longest, from its link ends."""
    waits = [
        Wait(
            stage,
            rank,
            link.peer.stage,
            link.peer.rank,
            f"{purpose} on the {link.name}",
            now - since,
        )
        for link in links
        if (waiting := getattr(link, "waiting", None)) is not None
        for since, purpose in [waiting]
    ]
    return max(waits, key=lambda wait: wait.seconds, default=None)


def explain(waits: Mapping[int, Wait]) -> str:
    """A sentence for the whole run: who is waited for without waiting, then who waits for whom."""
    guilty = sorted({(w.for_stage, w.for_rank) for w in waits.values() if w.for_rank not in waits})
    names = (
        " and ".join(f"stage {stage} (rank {rank})" for stage, rank in guilty)
        or "each other in a circle"
    )
    return f"no progress: all wait for {names}; " + "; ".join(
        str(waits[rank]) for rank in sorted(waits)
    )


class Watchdog:
    """A thread that looks on. Stop it with `stop`.

    Args:
        stage, rank, world_size: of this process.
        links: gives its link ends.
        warn_seconds: a wait beyond this is told.
        say: called on rank 0 with the sentence.
    """

    def __init__(
        self,
        stage: int,
        rank: int,
        world_size: int,
        links: Callable[[], Iterable[Any]],
        warn_seconds: float,
        say: Callable[[str], None] = LOG.warning,
    ) -> None:
        self._stage, self._rank, self._world_size, self._links = stage, rank, world_size, links
        self._warn_seconds, self._say = warn_seconds, say
        self._posted = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(self._warn_seconds)

    def _watch(self) -> None:
        told = 0.0
        while not self._stopped.wait(self._warn_seconds / 4):
            now = time.perf_counter()
            wait = longest_wait(self._stage, self._rank, self._links(), now)
            long = wait is not None and wait.seconds > self._warn_seconds
            if long or self._posted:
                change_notice(f"waits/{self._rank}", json.dumps(wait) if long else "")
                self._posted = long
            if long:
                LOG.warning("%s", wait)
            if self._rank == 0 and wait is not None and long and now - told > self._warn_seconds:
                told = now
                self._stopped.wait(self._warn_seconds / 2)  # the others look a little later
                self._say(explain(self._all_waits() or {0: wait}))

    def _all_waits(self) -> dict[int, Wait]:
        texts = {rank: read_notice(f"waits/{rank}") for rank in range(self._world_size)}
        return {rank: Wait(*json.loads(text)) for rank, text in texts.items() if text}


def start_log(folder: Path, stage: int, rank: int) -> Path:
    """Everything this rank logs, DeepSpeed's lines too, also goes to a file of its own:
    `folder`/rank-003.log."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:03d}.log"
    handler = logging.FileHandler(path)
    prefix = f"stage {stage} rank {rank} {socket.gethostname()}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix} %(levelname)s %(message)s"))
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    for name in ("ds_local", "DeepSpeed"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
    return path


def say(sentence: str) -> None:
    """To the console, past the progress line."""
    print(f"\n{sentence}", file=sys.stderr, flush=True)
