"""How a command ends: 0, or 1 and an error that is told once.

An error of ours is a sentence; anybody else's keeps its traceback. Both also go into the rank's
log.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from ds_local.errors import DsLocalError
from ds_local.links.logs import LOG, say

INTERRUPTED = 130  # as shells say it of SIGINT
_LATER_SECONDS = 5.0


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end this process with its exit status."""
    code = status_of(main)
    if code and "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(code)  # a failed rank must not wait in anybody's destructor
    sys.exit(code)


def status_of(main: Callable[[], int | None]) -> int:
    """Run a command; its exit status, once its error has been told."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except DsLocalError as error:
        code = _failed(error, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        code = INTERRUPTED
        say("interrupted")
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = _failed(error, traceback.format_exc())
    return code


def _failed(error: Exception, text: str) -> int:
    """Tell of an error. Returns the exit status."""
    if failures := sys.modules.get("ds_local.links.failures"):  # else nobody has been met
        failures.report_uncaught(error)
    if LOG.handlers:
        LOG.info("ended by an error", exc_info=error)
    if os.environ.get("LOCAL_RANK", "0") != "0" and not _have_met():
        # most likely all ranks found the same mistake; the first one says it, and the launcher ends
        # the rest
        time.sleep(_LATER_SECONDS)
    say(text.rstrip())
    return 1


def _have_met() -> bool:
    """Is this process one of several that work together?"""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
