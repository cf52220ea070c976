"""Jobs of one run: started, started again when they die, killed on purpose, and looked at."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TICK_SECONDS = 0.05


class Job:
    """A command that ends well in the end, whatever happens to it.

    Args:
        name: of its log.
        words: the command.
        metrics: the metrics.jsonl that it writes.
        folder: for its log.
    """

    def __init__(self, name: str, words: Sequence[str], metrics: Path, folder: Path) -> None:
        self.name, self._words, self._metrics, self._folder = name, list(words), metrics, folder
        self.starts = 0
        self.ended: list[tuple[float, int]] = []  # (when, status) of every end
        self.start()

    def start(self) -> None:
        self.starts += 1
        with (self._folder / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(self._words, stdout=log, stderr=log)

    @property
    def is_done(self) -> bool:
        return self.process.poll() == 0

    def rows(self) -> list[dict[str, Any]]:
        try:
            lines = self._metrics.read_text().splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def steps(self) -> int:
        """That it has told of."""
        try:
            with self._metrics.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 2048))
                lines = [line for line in file.read().split(b"\n")[1:] if line.endswith(b"}")]
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (OSError, ValueError):
            return 0

    def text(self) -> str:
        return (self._folder / f"{self.name}.log").read_text(errors="replace")


class Fleet:
    """All jobs of a run. Use it as a context: whatever happens, none outlives it."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs = dict(jobs)
        self.began = time.perf_counter()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: Any) -> None:
        for job in self.jobs.values():
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def look(self) -> bool:
        """Start again what has died; True once all have ended well."""
        time.sleep(_TICK_SECONDS)
        for job in self.jobs.values():
            status = job.process.poll()
            if status:
                job.ended.append((self.seconds, status))
                job.start()
        return all(job.is_done for job in self.jobs.values())

    def kill(self, name: str) -> None:
        self.jobs[name].process.send_signal(signal.SIGKILL)


def lost_steps(fleet: Fleet) -> int:
    """Steps whose updates units have lost, as they say."""
    total = 0
    for job in fleet.jobs.values():
        for line in job.text().splitlines():
            if " lost " in line and " steps: " in line:
                total += int(line.split(" lost ")[1].split()[0].replace(",", ""))
    return total


def train_words(**options: Any) -> list[str]:
    """The command that trains, with these options of scripts/train.py."""
    words = [sys.executable, "-m", "ds_local", "train"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}" if name != "deepspeed_config" else f"--{name}"
        words += [option] if value is True else [option, str(value)]
    return words
