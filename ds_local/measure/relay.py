"""Distance between ranks: an Ethernet switch in user space that holds every frame back for a while.

The kernel's own delay (netem) is not compiled into every system. Frames of the ranks' virtual
interfaces are read and written through packet sockets, so any protocol passes unchanged. Meant for
small messages: how far, not how fast.
"""

from __future__ import annotations

import heapq
import itertools
import select
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

_ALL_PROTOCOLS = 3
_OUTGOING = 4  # our own frames, which a packet socket sees too
_BROADCAST_BIT = 1


class Relay:
    """Joins interfaces once they exist. `delay_seconds`, one way, may be changed at any time.

    Args:
        names: of the interfaces, one for each rank.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.delay_seconds = 0.0
        self._names = list(names)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _attach(self) -> list[socket.socket]:
        ports: list[socket.socket] = []
        while len(ports) < len(self._names) and not self._closed.is_set():
            port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
            try:
                port.bind((self._names[len(ports)], 0))
                ports.append(port)
            except OSError:  # not there yet
                port.close()
                time.sleep(0.05)
        return ports

    def _serve(self) -> None:
        ports = self._attach()
        home: dict[bytes, socket.socket] = {}  # hardware address -> port
        waiting: list[
            tuple[float, int, socket.socket, bytes]
        ] = []  # (due, order of arrival, port, frame)
        order = itertools.count()
        while not self._closed.is_set():
            patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
            for port in select.select(ports, [], [], patience)[0]:
                try:
                    frame, sender = port.recvfrom(1 << 17)
                except OSError:  # told once when the interface goes down, or was not up yet
                    continue
                if sender[2] == _OUTGOING:
                    continue
                target, source = frame[:6], frame[6:12]
                home[source] = port
                everyone = target[0] & _BROADCAST_BIT or target not in home
                for other in ports if everyone else [home[target]]:
                    if other is not port:
                        heapq.heappush(
                            waiting,
                            (time.monotonic() + self.delay_seconds, next(order), other, frame),
                        )
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, other, frame = heapq.heappop(waiting)
                with suppress(
                    OSError
                ):  # a frame to a rank that has ended is lost, as on any network
                    other.send(frame)
        for port in ports:
            port.close()
