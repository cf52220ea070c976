"""SIGKILL at every file operation of a piece of code, one after the other, in forked processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "os.utime",
}


def killed_everywhere(action: Callable[[], object], folder: Path) -> Iterator[str]:
    """Run `action` in a process that dies before its first file operation below `folder`, then in
    one that dies before its second, and so on; gives the operation each time. The last process
    comes to its end, and "end" is given. What happens in between is the caller's."""
    number = 0
    while True:
        number += 1
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _die_at(number, folder, write)
            try:
                action()
                os.write(write, b"end")
            finally:
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            told = pipe.read()
        assert told, "the action failed"
        yield told
        if told == "end":
            return


def _die_at(number: int, folder: Path, pipe: int) -> None:
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and str(folder) in str(args[0]):
            seen += 1
            if seen == number:
                os.write(pipe, f"{event} {Path(str(args[0])).name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
