"""A signal, or the end of the launcher, becomes one orderly stop.

SIGTERM, SIGINT and SIGHUP are heard by a thread of their own, also while the main thread waits in C
code. Before there is anything to save they end the process at once. Later the first one asks all
ranks to save and leave, and a second SIGINT ends this process at once. Torch's launcher passes a
SIGINT on to ranks that a terminal has told already; within a second both count as one.

A launcher that is killed takes no rank with it (DeepSpeed's leaves them training when it gets a
SIGTERM), so ranks look after theirs.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from ds_local.links.logs import LOG

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")  # programs
LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch")
SAME_SECONDS = 1.0  # two SIGINTs within are one that came on two ways
TICK_SECONDS = 0.5


class Signals:
    """Hears signals from `__enter__` to `__exit__`. To be made in the main thread.

    After it has been told to stop, whatever writes to a console that has been closed writes to
    nowhere instead of failing.
    """

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._may_die_alone = self._asked = False
        self._interrupted: float | None = None
        self._launchers = launchers()
        self._before: dict[int, Any] = {}
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        self._reads.settimeout(TICK_SECONDS)

    def __enter__(self) -> Signals:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        # what comes to a child in the moment of its birth must not be taken for ours
        os.register_at_fork(
            before=self._hold_back, after_in_parent=self._let_come, after_in_child=self._in_child
        )
        threading.Thread(target=self._hear, daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._forget()
        self._writes.close()  # ends the thread

    def _hold_back(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _let_come(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _in_child(self) -> None:
        self._forget()
        self._let_come()

    def _forget(self) -> None:
        """Handlers as they were."""
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def stop_with(self, stop: Callable[[], None], may_die_alone: bool = False) -> None:
        """From now on there is something to save; `stop` asks for it, from another thread.

        Args:
            may_die_alone: without its launcher this process ends at once, as if it had died with
                it: the others wait until somebody starts it again.
        """
        self._stop, self._may_die_alone = stop, may_die_alone

    # --- in the thread --------------------------------------------------------------------------

    def _hear(self) -> None:
        looked = time.monotonic()
        while True:
            try:
                numbers = self._reads.recv(64)
            except TimeoutError:
                numbers = None
            except OSError:
                return
            if numbers == b"":
                return  # closed
            for number in numbers or b"":
                if number in SIGNALS:
                    self._heard(number)
            if time.monotonic() - looked >= TICK_SECONDS:
                looked = time.monotonic()
                _mind_the_console()
                for launcher in self._launchers:
                    if not _runs(launcher):
                        gone = f"the launcher (process {launcher.pid}) is gone"
                        if self._may_die_alone:
                            leave_at_once(f"{gone}: left at once, to be started again", 1)
                        self._ask(gone, 1)

    def _heard(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        _mind_the_console()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted >= SAME_SECONDS:
                leave_at_once("a second SIGINT: left at once, without saving", 128 + number)
            self._interrupted = self._interrupted or now
        self._ask(name, 128 + number)

    def _ask(self, why: str, status: int) -> None:
        if self._stop is None:
            told = f"{why} during the start: left at once, there is nothing to save"
            # a launcher tells all its ranks, and does so too when one has refused a setting
            leave_at_once(told if os.environ.get("LOCAL_RANK", "0") == "0" else "", status)
        elif not self._asked:
            self._asked = True
            LOG.info("%s: asking all ranks to save and leave", why)
            self._stop()


def leave_at_once(sentence: str, status: int) -> None:
    """End this process, whatever its main thread is in."""
    with suppress(OSError):
        os.write(2, f"\n{sentence}\n".encode() if sentence else b"")
    os._exit(status)


def launchers() -> list[psutil.Process]:
    """The launchers among the processes above this one."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            with suppress(psutil.Error):  # it ends in this moment, or is not ours to look at
                if is_launcher(process.cmdline()):
                    found.append(process)
    return found


def is_launcher(words: list[str]) -> bool:
    """Is this the command line of one?"""
    if not words:
        return False
    interpreted = Path(words[0]).name.startswith("python")
    programs = words[1:4] if interpreted else words[:1]
    return any(
        Path(word).name in LAUNCHERS or word.startswith(LAUNCHER_MODULES) for word in programs
    )


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _mind_the_console() -> None:
    """A terminal or pipe whose other end is gone is replaced by nowhere: no write may fail."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or no file at all
            descriptor = stream.fileno()
            poll = select.poll()
            poll.register(descriptor, 0)
            if poll.poll(0):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
