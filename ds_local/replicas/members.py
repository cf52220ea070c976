"""Who of a stage's replicas is there: connections, who leads, and the epochs of the group."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.frames import read_frame, send_frame
from ds_local.links.listener import Listener, connect, unreachable
from ds_local.links.logs import LOG
from ds_local.outputs import write_whole

TICK_SECONDS = 0.2
ANSWER_SECONDS = 5.0
NEW, LEADS, FOLLOWS = "new", "leads", "follows"


@dataclass(frozen=True)
class MeetingPlace:
    """Where the replicas of a stage meet.

    Args:
        name: of the stage, for messages.
        folder: for addresses and epochs; all replicas see it.
        facts: of the run; all must have the same.
        timeout_seconds: longest wait for a member that lives.
        reconnect_seconds: longest wait for one that cannot be reached, and for all to come.
    """

    name: str
    folder: Path
    facts: str
    timeout_seconds: float
    reconnect_seconds: float

    def card(self, replica: int) -> Path:
        return self.folder / f"replica-{replica}.json"

    def read_card(self, replica: int) -> dict[str, Any]:
        """Nothing where there is none."""
        try:
            return dict(json.loads(self.card(replica).read_text()))
        except (OSError, ValueError):
            return {}


class Members:
    """This replica among those of its stage.

    Args:
        replica: of this job.
        num_replicas: that there are when nobody is missing.
        place: where they meet.
        host: address of this machine.
    """

    def __init__(self, replica: int, num_replicas: int, place: MeetingPlace, host: str) -> None:
        self.replica, self.num_replicas, self.place = replica, num_replicas, place
        self.members: list[int] = []  # the first one leads
        self._role, self._epoch = NEW, 0
        self._unreached = 0.0  # since when the leader cannot be reached
        self._connections: dict[int, socket.socket] = {}  # to members; a follower has one
        self._joiners: dict[int, tuple[socket.socket, int]] = {}
        self._frames: queue.Queue[tuple[int, socket.socket, Any, Tensor | None]] = queue.Queue()
        self._early: dict[int, tuple[int, bool, Tensor | None]] = {}  # contributions, by replica
        self._lock = threading.RLock()
        self._listener = Listener(
            host,
            place.card(replica),
            place.reconnect_seconds,
            ANSWER_SECONDS,
            self._welcome,
            self._turn_away,
        )

    # --- who is there -----------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        """Longest wait for another: until its connection is known to be lost, until it is given up,
        and as long as a member that lives may take."""
        return self.place.timeout_seconds + 2 * (self.place.reconnect_seconds + ANSWER_SECONDS)

    @property
    def _reach(self) -> float:
        return self.place.reconnect_seconds

    def _connect(self, other: int, kind: str, step: int) -> socket.socket | None:
        card = self.place.read_card(other)
        if "port" not in card:
            return None
        if (why := unreachable(card)) is not None:
            raise TransportError(f"replica {other} of {self.place.name} cannot be reached: {why}")
        try:
            return self._greet(card, kind, step)
        except OSError:
            return None

    def _greet(self, card: dict[str, Any], kind: str, step: int = 0) -> socket.socket:
        """Raises OSError when nobody is there."""
        hello = {"kind": kind, "replica": self.replica, "step": step, "facts": self.place.facts}
        return connect(card, self.place.reconnect_seconds, ANSWER_SECONDS, hello)

    def _role_of(self, other: int) -> str | None:
        """What it is, or "dead"; None where it cannot be reached."""
        card = self.place.read_card(other)
        if "port" not in card:
            return "dead"
        try:
            with self._greet(card, "look") as asked:
                return str(read_frame(asked)[0].get("role"))
        except (ConnectionRefusedError, ConnectionResetError):
            return "dead"
        except OSError:
            return None

    def _keep(self, replica: int, connection: socket.socket) -> None:
        """A member's connection, and a thread that reads it."""
        connection.settimeout(None)
        with self._lock:
            former = self._connections.get(replica)
            self._connections[replica] = connection
        if former is not None and former is not connection:
            former.close()
        threading.Thread(target=self._hear, args=(replica, connection), daemon=True).start()

    def _hear(self, replica: int, connection: socket.socket) -> None:
        try:
            while True:
                said, data = read_frame(connection, lambda n: torch.empty(n, dtype=torch.uint8))
                numbers = None if data is None else data.view(torch.float32)
                self._frames.put((replica, connection, said, numbers))
        except (OSError, ValueError):
            self._frames.put((replica, connection, None, None))

    def _drop(self, replica: int, connection: socket.socket) -> None:
        with self._lock:
            if self._connections.get(replica) is connection:
                del self._connections[replica]
        with suppress(OSError):
            connection.close()

    def _send(self, replica: int, said: dict[str, Any], data: Tensor | None = None) -> None:
        connection = self._connections.get(replica)
        if connection is not None:
            with suppress(OSError):  # the thread that reads finds out
                send_frame(connection, said, data)

    def _turn_away(self, connection: socket.socket, error: BaseException) -> None:
        LOG.debug("no answer to a replica: %r", error)
        connection.close()

    def _welcome(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        if hello["facts"] != self.place.facts:
            refused = (
                f"the replicas of {self.place.name} were not started with the same model, data "
                "and configuration; start all with the same"
            )
            send_frame(connection, {"refused": refused})
            connection.close()
            return
        kind, replica, step = str(hello["kind"]), int(hello["replica"]), int(hello["step"])
        with self._lock:
            if kind == "join" and self._role in (LEADS, NEW):
                send_frame(connection, {"wait": self._role})
                if self._role == LEADS or self.replica == 0:
                    self._joiners[replica] = connection, step
                    return
            elif kind == "join":
                send_frame(connection, {"leader": self.members[0]})
            elif kind == "member" and self._role != NEW:
                send_frame(connection, {"welcome": True})
                self._keep(replica, connection)
                return
            else:
                send_frame(connection, {"role": self._role})
        connection.close()

    def end(self, finished: bool, step: int) -> None:
        """This replica has ended well, after so many steps."""
        if finished:
            card = {"ended": self.place.facts, "step": step}
            write_whole(self.place.card(self.replica), json.dumps(card) + "\n")
        self.close()

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            joiners = [connection for connection, _ in self._joiners.values()]
            for connection in [*self._connections.values(), *joiners]:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._connections.clear()

    # --- epochs -----------------------------------------------------------------------------------

    def _last_epoch(self) -> int:
        names = [path.stem for path in self.place.folder.glob("epoch-*.json")]
        return max((int(name.removeprefix("epoch-")) for name in names), default=0)

    def _new_epoch(self, members: list[int]) -> None:
        """The members are others from now on, if nobody else has said so first; they hear it at
        once.

        Raises:
            TransportError: when somebody has, or no file can be made.
        """
        number = self._epoch + 1
        text = json.dumps({"members": members, "by": self.replica}) + "\n"
        path = self.place.folder / f"epoch-{number:06d}.json"
        try:
            file = path.open("x")
        except FileExistsError:
            raise TransportError(
                f"the other replicas of {self.place.name} took replica {self.replica} for dead and "
                "went on; it begins again with their weights"
            ) from None
        except OSError as error:
            raise TransportError(
                f"replica {self.replica} of {self.place.name} cannot make {path} "
                f"({error.strerror}), by which replicas agree on who is there; make room there"
            ) from error
        with suppress(OSError), file:  # that there is a file decides; a full disk leaves it empty
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.members, self._epoch = members, number
        for member in members:
            self._send(member, {"members": members, "epoch": number})
        for old in range(number - 20, number - 10):  # enough to see what happened
            with suppress(OSError):
                (self.place.folder / f"epoch-{old:06d}.json").unlink()
