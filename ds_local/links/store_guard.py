"""A limit for waits through the store that rank 0 holds.

Before ranks are connected with each other they meet through a store, and again whenever a process
group is made. Torch limits none of these waits while the process that holds the store is stopped:
they stay in a system call that no other thread can end.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ds_local.links import notices as the_notices
from ds_local.links.logs import LOG
from ds_local.links.notices import Absence, Notices


def limited(call: Callable[[], Any], seconds: float) -> Any:
    """What `call` returns or raises; TimeoutError when that takes longer. Then it is left behind,
    in a thread that ends with the process."""
    box: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((True, call()))
        except BaseException as error:
            box.put((False, error))

    threading.Thread(target=run, daemon=True, name="store").start()
    try:
        fine, value = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if not fine:
        raise value
    return value


@contextmanager
def store_guard(what: str, seconds: float) -> Iterator[None]:
    """Inside, process groups are made. If that takes longer and rank 0 does not answer, this
    process says so and ends, since nothing else can end the wait.

    Args:
        what: for the sentence.
    """
    notices = the_notices.current()
    if notices is None or notices.rank == 0:
        yield
        return
    done = threading.Event()
    arguments = notices, what, seconds, done
    threading.Thread(target=_watch, args=arguments, daemon=True, name="store guard").start()
    try:
        yield
    finally:
        done.set()


def _watch(notices: Notices, what: str, seconds: float, done: threading.Event) -> None:
    wait = seconds
    while not done.wait(wait):
        if notices.ask(0, "state") is Absence.SILENT and not done.is_set():
            sentence = (
                f"TransportError: rank 0 does not answer: stopped, or out of reach; {what} waits "
                "for its store"
            )
            LOG.error("%s", sentence)
            with suppress(OSError):
                os.write(2, f"\n{sentence}\n".encode())
            os._exit(1)
        wait = 1.0
