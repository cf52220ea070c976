"""Between a device and a link: copies to and from host buffers, or no host at all; both beside what
the device computes.

On a CUDA device the buffers are pinned and the copies run on a stream of their own. The host never
waits for the device here: a message leaves from a thread as soon as its copy is done, while the
stage already launches its backward pass, and what was received is ordered before the computation
that follows by an event. On a CPU a copy is a copy. A stand-in for a device
holds all of it to torch's documented rules for streams (`tests/standin.py`).
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError


def ranks_here(environment: Mapping[str, str] = os.environ, default: int = 1) -> int:
    """How many ranks the launcher started on this machine, if it says so (torchrun and DeepSpeed
    name it differently)."""
    return int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", default)))


def stand_on(device: torch.device) -> None:
    """For a thread that asks or waits for events of a device. A new one begins on device 0, where
    that would take memory from whose it is."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Staging:
    """One link end's way between its host buffers and `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self.device = self._stream.device  # by number, also where the device was just "cuda"

    def buffer(self, num_bytes: int) -> Tensor:
        """Bytes on the host. Torch gives pinned ones to nobody else before copies from them are
        done."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def to_host(self, views: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Any:
        """Copy tensors into the views of a host buffer. The caller may drop them at once, but not
        write into them in place.

        Returns:
            An event to wait for before the buffer is read; None when it can be read already.
        """
        if self._stream is None:
            for name, view in views.items():
                view.copy_(tensors[name].detach())
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for name, view in views.items():
                tensor = tensors[name].detach()
                view.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(
                        self._stream
                    )  # its memory is not given away while the copy runs
            # one that blocks: the thread that waits for it would else take a core to itself
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
            return event

    def to_device(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The views of a host buffer as tensors on the device; the buffer must not be written to
        any more."""
        if self._stream is None:
            return {name: view.to(self.device) for name, view in views.items()}
        with torch.cuda.stream(self._stream):
            tensors = {
                name: view.to(self.device, non_blocking=True) for name, view in views.items()
            }
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in tensors.values():
            tensor.record_stream(computing)
        return tensors


class Direct:
    """Tensors from device to device, over NCCL on CUDA and over gloo on a CPU, beside the host
    message that announces them.

    The receiver posts its receive when that message has come, so no kernel waits on its device for
    what is not on its way; the sender's copies do wait on a stream of their own. On CUDA each rank
    needs a device to itself.
    """

    def __init__(self, device: torch.device, group: Any, peer: int) -> None:
        self._device, self._group, self._peer = device, group, peer
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @staticmethod
    def backend(device: torch.device) -> str:
        """Of the process group. Raises ConfigError where ranks share a GPU, which NCCL does not
        do."""
        if device.type != "cuda":
            return "gloo"
        ranks, devices = ranks_here(), torch.cuda.device_count()
        if ranks > devices:
            raise ConfigError(
                f"{SECTION}.link.past_host needs a GPU for every rank, but {ranks} ranks share "
                f"{devices} on this machine; set it to false"
            )
        return "nccl"

    def connect(self, sends: bool) -> None:
        """Send or receive a byte. A call of both ends: NCCL connects two ranks in their first
        transfer, where each waits for the other; in a step a stage may wait for something else."""
        with torch.cuda.stream(self._stream):
            byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
            transfer: Any = dist.isend if sends else dist.irecv
            transfer(byte, self._peer, self._group).wait()

    def send(self, packed: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Copy tensors into one buffer and send it. Returns what to wait for before the buffer's
        memory may serve again."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer = torch.empty(packed.num_bytes, dtype=torch.uint8, device=self._device)
            for name, view in packed.views(buffer).items():
                view.copy_(tensors[name].detach())
                if self._stream is not None:
                    tensors[name].record_stream(self._stream)
            return _Sent(dist.isend(buffer, self._peer, self._group), buffer)

    def receive(self, packed: Any) -> tuple[Any, Tensor]:
        """(what to wait for, the buffer). On CUDA waiting orders the computation that follows; the
        host goes on."""
        with torch.cuda.stream(self._stream):
            buffer = torch.empty(packed.num_bytes, dtype=torch.uint8, device=self._device)
            work = dist.irecv(buffer, self._peer, self._group)
        if self._stream is None:
            return work, buffer
        buffer.record_stream(torch.cuda.current_stream(self._device))
        return _InStream(work), buffer


class _Sent(NamedTuple):
    """A send, and the buffer that it reads."""

    work: Any
    buffer: Tensor

    def wait(self, limit: timedelta) -> None:
        self.work.wait(limit)


class _InStream(NamedTuple):
    """A receive that the current stream waits for, not the host; the group's own limit holds."""

    work: Any

    def wait(self, limit: timedelta) -> None:
        self.work.wait()


class Departures:
    """Starts sends in order, each after its event, on a thread of its own that exists once it is
    needed.

    Args:
        device: of the events.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread: ThreadPoolExecutor | None = None

    def after(self, event: Any, start: Callable[[], Any]) -> Departure:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "link", partial(stand_on, self._device))
        return Departure(self._thread.submit(lambda: (event.synchronize(), start())[1]))


class Departure:
    """A send that starts later; waited for like the `Work` it becomes."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self, limit: timedelta) -> None:
        """Raises TimeoutError or RuntimeError."""
        try:
            work = self._future.result(limit.total_seconds())
        except (
            concurrent.futures.TimeoutError
        ) as error:  # another class than the builtin before Python 3.11
            raise TimeoutError from error
        work.wait(limit)
