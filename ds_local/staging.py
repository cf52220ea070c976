"""Copies between a device and the host buffers that links send from and receive into, beside what the device computes.

On a CUDA device the buffers are pinned and the copies run on a stream of their own. The host never waits for the device here: a
message leaves from a thread as soon as its copy is done, while the stage already launches its backward pass, and what was
received is ordered before the computation that follows by an event. On a CPU a copy is a copy. The CUDA branches follow
torch's documented rules for streams but have not been run on a GPU yet; tested is how sends wait for copies that take long.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor


class Staging:
    """One link end's way between its host buffers and `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def buffer(self, num_bytes: int) -> Tensor:
        """Bytes on the host. Torch gives pinned ones to nobody else before copies from them are done."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def to_host(self, views: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Any:
        """Copy tensors into the views of a host buffer. The caller may drop them at once, but not write into them in place.

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
                    tensor.record_stream(self._stream)  # its memory is not given away while the copy runs
            return self._stream.record_event()

    def to_device(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The views of a host buffer as tensors on the device; the buffer must not be written to any more."""
        if self._stream is None:
            return {name: view.to(self.device) for name, view in views.items()}
        with torch.cuda.stream(self._stream):
            tensors = {name: view.to(self.device, non_blocking=True) for name, view in views.items()}
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in tensors.values():
            tensor.record_stream(computing)
        return tensors


class Departures:
    """Starts sends in order, each after its event, on a thread of its own that exists once it is needed."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def after(self, event: Any, start: Callable[[], Any]) -> Departure:
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="link")
        return Departure(self._thread.submit(lambda: (event.synchronize(), start())[1]))


class Departure:
    """A send that starts later; waited for like the `Work` it becomes."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self, limit: timedelta) -> None:
        """Raises TimeoutError or RuntimeError."""
        try:
            work = self._future.result(limit.total_seconds())
        except concurrent.futures.TimeoutError as error:  # another class than the builtin before Python 3.11
            raise TimeoutError from error
        work.wait(limit)
