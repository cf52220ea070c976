"""Asynchronous saves: what a checkpoint needs is copied to host memory, and a thread writes it
while training goes on.

At most one save is under way, and its copies are used again for the next, so a rank holds its part
of a checkpoint once more at most. The threads of all ranks agree over a process group of their own,
as ranks do over the world in a save that waits: so a checkpoint is as whole.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor

from ds_local.errors import SaveError
from ds_local.links.agreement import over

_FRESH = ("layer_", "head_")  # files whose tensors are copies already, made for them


class AsyncSaves:
    """The saves of one rank.

    Args:
        group: of all ranks, which nobody else uses.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copies: dict[tuple[torch.dtype, int], list[Tensor]] = {}  # to be used again
        self._lent: list[Tensor] = []
        self.tell: Callable[[SaveError], None] = _tell

    # --- copies -----------------------------------------------------------------------------------

    def copied(self, state: Any, file: str) -> Any:
        """What a file is to hold, in memory that training does not touch."""
        return copy.copy(state) if file.startswith(_FRESH) else self._copied(state)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._on_host(value.detach())
        if isinstance(value, dict):
            found = copy.copy(value)
            found.update((key, self._copied(part)) for key, part in value.items())
            return found
        if type(value) in (list, tuple):
            return type(value)(self._copied(part) for part in value)
        return copy.deepcopy(value)

    def _on_host(self, tensor: Tensor) -> Tensor:
        at = tensor.dtype, tensor.numel()
        free = self._copies.setdefault(at, [])
        pinned = tensor.device.type == "cuda"
        flat = free.pop() if free else torch.empty(at[1], dtype=at[0], pin_memory=pinned)
        self._lent.append(flat)
        return flat.view(tensor.shape).copy_(tensor, non_blocking=True)

    # --- the thread -------------------------------------------------------------------------------

    def start(self, work: Callable[[], None]) -> None:
        """Do this in a thread, once the copies are there."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._thread = threading.Thread(target=self._run, args=(work,), name="a save")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with over(self._group):
                work()
        except BaseException as error:  # whoever waits gets it
            self._failure = error
            if isinstance(error, SaveError):
                self.tell(error)
        finally:
            for flat in self._lent:
                self._copies[flat.dtype, flat.numel()].append(flat)
            self._lent = []

    def wait(self) -> None:
        """Until the save under way has ended, if one is.

        Raises:
            What it raised, once: SaveError on all ranks, when the disk of one does not take it.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def settle(self) -> None:
        """As `wait`, where a save that failed for lack of room has been told, and is no matter any
        more."""
        try:
            self.wait()
        except SaveError as error:
            logger.info(f"went on without the save that failed: {error}")


def _tell(error: SaveError) -> None:
    logger.error(f"{error}; training goes on")


class KeptFiles:
    """DeepSpeed's checkpoint engine while a save is copied: keeps what it is to write."""

    def __init__(self, inner: Any, saves: AsyncSaves) -> None:
        self.inner, self._saves = inner, saves
        self._jobs: list[Callable[[Any], None]] = []

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        state = self._saves.copied(state_dict, path.rpartition("/")[2])
        self._jobs.append(lambda files: files.save(state_dict=state, path=path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._jobs.append(lambda files: files.makedirs(path, exist_ok=exist_ok))

    def write(self, files: Any) -> None:
        """All that has been kept, by way of another checkpoint engine; each file's state is let go
        when it is written."""
        for job in self._jobs:
            job(files)
        self._jobs.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
