"""Frames on a socket: a short text and some bytes, one after the other."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

_LENGTHS = struct.Struct("<IQ")  # of the text, of the bytes
_MOST_TEXT = 1 << 20


def send_frame(
    connection: socket.socket, said: Mapping[str, Any], data: Tensor | None = None
) -> None:
    """Raises OSError when the other end is gone."""
    text = json.dumps(said).encode()
    size = 0 if data is None else data.nbytes
    connection.sendall(_LENGTHS.pack(len(text), size) + text)
    if data is not None and size:
        connection.sendall(_bytes_of(data))


def read_frame(
    connection: socket.socket, room: Callable[[int], Tensor] | None = None
) -> tuple[dict[str, Any], Tensor | None]:
    """The text and the bytes of the next frame.

    Args:
        room: a byte tensor of so many bytes; None: there must be none.

    Raises:
        OSError: when the other end is gone, or what comes is no frame.
    """
    head = bytearray(_LENGTHS.size)
    _fill(connection, memoryview(head))
    length, size = _LENGTHS.unpack(head)
    if length > _MOST_TEXT or (size and room is None):
        raise ConnectionError("this is no frame")
    text = bytearray(length)
    _fill(connection, memoryview(text))
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConnectionError("this is no frame") from error
    if not isinstance(said, dict):
        raise ConnectionError("this is no frame")
    data = None
    if size and room is not None:
        data = room(size)
        _fill(connection, _bytes_of(data))
    return said, data


def _bytes_of(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array).cast("B")


def _fill(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the other end has closed")
        view = view[count:]
