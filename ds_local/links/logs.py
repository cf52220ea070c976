"""What a rank writes: a log file of its own, and sentences on the console."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

from tqdm import tqdm

LOG = logging.getLogger("ds_local")


class _LogFile(logging.FileHandler):
    """A log that takes what the disk takes: a full one is told of where it matters, and a line lost
    here is no reason for a traceback on the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def start_log(folder: Path, stage: int, rank: int) -> Path:
    """Everything this rank logs, DeepSpeed's lines too, also goes to a file of its own:
    `folder`/rank-003.log."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:03d}.log"
    handler = _LogFile(path)
    prefix = f"stage {stage} rank {rank} {socket.gethostname()}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix} %(levelname)s %(message)s"))
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    for name in ("ds_local", "DeepSpeed"):
        logger = logging.getLogger(name)
        for former in [one for one in logger.handlers if isinstance(one, _LogFile)]:
            logger.removeHandler(former)  # of an earlier run of this process
            former.close()
        logger.addHandler(handler)
    return path


def say(sentence: str) -> None:
    """To the console, on a line of its own beside a progress bar of this or another rank."""
    if not getattr(tqdm, "_instances", ()) and "RANK" in os.environ and sys.stderr.isatty():
        sentence = f"\n{sentence}"
    tqdm.write(sentence, file=sys.stderr)
    sys.stderr.flush()
