"""One process at a time has a run folder: a lock that says whose it is, and outlives nobody.

The lock is a small file. On the owner's host its process is looked up. From elsewhere (another
host, another container) the owner shows by a sign of life every few seconds: the file's time, set
by the file server, so no two clocks are compared. An owner that another one took for dead finds
out at its next sign and ends before it writes anything more.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ds_local.errors import RunError
from ds_local.outputs import reason, scratch_name
from ds_local.outputs.processes import Process

NAME = "lock.json"
BEAT_SECONDS = 5.0  # between two signs of life
ALONE_SECONDS = 10.0  # for another start to clear a lock away
SILENCE_SECONDS = 30.0  # an owner elsewhere that was silent for so long is gone


class RunLock:
    """The lock of a run folder. `acquire` it first, `release` it last.

    Args:
        folder: of the run; made if it is not there.
        say: told when a start has to wait for a sign of life.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self.folder, self.path = folder, folder / NAME
        self._say = say
        self._owner = Process.own()
        self._text = ""
        self._file: Any = None
        self._lost = threading.Event()
        self._released = threading.Event()
        self._made: list[Path] = []  # folders, the outermost first

    def acquire(self) -> None:
        """Raises RunError when another process has the folder, or it cannot be written to."""
        facts = {
            **self._owner._asdict(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._text = json.dumps(facts, indent=1) + "\n"
        try:
            self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()][::-1]
            self.folder.mkdir(parents=True, exist_ok=True)
            mine = self.folder / scratch_name(NAME)
            try:
                mine.write_text(self._text)
                while not self._taken(mine):
                    self._clear_away(mine)
                self._file = self.path.open()
            finally:
                mine.unlink(missing_ok=True)
        except OSError as error:
            existing = next(p for p in (self.folder, *self.folder.parents) if p.exists())
            raise RunError(
                f"cannot write to {self.folder}: {reason(error, existing)}; choose another --output"
            ) from error
        threading.Thread(target=self._live, daemon=True, name="run lock").start()

    def _taken(self, mine: Path) -> bool:
        try:
            os.link(mine, self.path)  # appears whole, or was there
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with self.path.open("x") as file:
                    file.write(self._text)
            except FileExistsError:
                return False
        return True

    def _clear_away(self, mine: Path) -> None:
        """Remove the lock of an owner that is gone. Raises RunError when it is not."""
        text = self._read()
        owner, sentence = self._owner_of(text)
        gone = None if owner is None else owner.is_gone()
        if gone is False or (gone is None and self._shows_life(mine, sentence)):
            raise RunError(
                f"{self.folder} is in use by {sentence}; wait for it to end, end it, or choose "
                "another --output"
            )
        with self._alone():
            if self._read() == text:  # nobody was quicker
                self.path.unlink(missing_ok=True)

    def _read(self) -> str:
        try:
            return self.path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One start at a time clears a lock away, or the second would take that of the first for
        the dead one. Where the file system has no such thing, or nobody lets go, it goes on."""
        folder = os.open(self.folder, os.O_RDONLY)
        deadline = time.monotonic() + ALONE_SECONDS
        try:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
                except OSError:
                    break
            yield
        finally:
            os.close(folder)

    @staticmethod
    def _owner_of(text: str) -> tuple[Process | None, str]:
        """The process that a lock names, and in words."""
        try:
            facts = json.loads(text)
            owner = Process(*(facts[key] for key in Process._fields))
            return owner, f"process {owner.pid} on {owner.host} since {facts['since']}"
        except (ValueError, TypeError, KeyError):
            return None, "somebody whose lock cannot be read"

    def _shows_life(self, mine: Path, sentence: str) -> bool:
        """Look at the time of the lock until it changes, or has been the same for too long."""
        os.utime(mine)
        first = self._sign()
        age = mine.stat().st_mtime - first
        wait = max(2 * BEAT_SECONDS, SILENCE_SECONDS - age)
        self._say(
            f"{self.folder} was in use by {sentence}; waiting {wait:.0f} s for a sign of life"
        )
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            if self._sign() != first:
                return self.path.exists()
            time.sleep(0.5)
        return False

    def _sign(self) -> float:
        """The lock's time; opening it asks the file server anew."""
        try:
            with self.path.open() as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return 0.0

    def _live(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):  # a full or slow disk is no reason to end
                if self.path.read_text() != self._text:
                    self._lost.set()
                os.utime(self._file.fileno())

    @property
    def is_lost(self) -> bool:
        """Has the last sign of life found another owner?"""
        return self._lost.is_set()

    def check(self) -> None:
        """Raises RunError when another process has taken the folder over."""
        try:
            mine = not self.is_lost and self.path.read_text() == self._text
        except FileNotFoundError:
            mine = False
        if not mine:
            raise RunError(
                f"{self.folder} was taken over by another process, which took this one for dead; "
                "this one ends"
            )

    def release(self) -> None:
        """Leave the folder to others, and nothing in it where there was nothing."""
        self._released.set()
        if self._file is None:
            return self._unmake()
        with suppress(OSError):
            if self.path.read_text() == self._text:
                self.path.unlink()
        self._file.close()
        self._file = None
        return self._unmake()

    def _unmake(self) -> None:
        with suppress(OSError):  # not empty
            for folder in reversed(self._made):
                folder.rmdir()
