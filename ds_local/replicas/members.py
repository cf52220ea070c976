"""Who of a stage's replicas is there: their connections, who leads, and how one comes back."""

from __future__ import annotations

import hmac
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.frames import mind, read_frame, send_frame
from ds_local.links.logs import LOG, say
from ds_local.links.waiting import OUTSIDE, waiting
from ds_local.outputs import write_whole

TICK_SECONDS = 0.2
_ANSWER_SECONDS = 5.0
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
        self._secret = secrets.token_hex(16)
        self._lock = threading.RLock()
        place.folder.mkdir(parents=True, exist_ok=True)
        self._listener = socket.create_server((host, 0))
        card = {"host": host, "port": self._listener.getsockname()[1], "secret": self._secret}
        write_whole(place.card(replica), json.dumps(card) + "\n")
        place.card(replica).chmod(0o600)
        threading.Thread(target=self._accept, daemon=True, name="replicas").start()

    # --- coming in --------------------------------------------------------------------------------

    def join(self, step: int) -> tuple[int, list[str] | None]:
        """Become a member.

        Args:
            step: that this replica has done, by its own checkpoint.

        Returns:
            (steps done by the members, [folder, tag] of the checkpoint to load for it or None where
            this replica has the same).

        Raises:
            TransportError: naming who is missing.
        """
        deadline = time.perf_counter() + self.place.reconnect_seconds
        with waiting(OUTSIDE, f"the other replicas of {self.place.name} to come"):
            while True:
                for other in self._others():
                    card = self.place.read_card(other)
                    if card.get("ended") == self.place.facts:
                        return self._after_the_end(other, int(card["step"]))
                    joined = self._ask_to_join(other, step, deadline)
                    if joined is not None:
                        return joined
                formed = self._form(step) if self.replica == 0 else None
                if formed is not None:
                    return formed
                if time.perf_counter() > deadline:
                    with self._lock:
                        here = {self.replica, *self._joiners}
                    away = [str(r) for r in range(self.num_replicas) if r not in here]
                    raise TransportError(
                        f"replica {self.replica} of {self.place.name} waited "
                        f"{self.place.reconnect_seconds:.0f} s for the others (missing here: "
                        f"{', '.join(away)}); start them, or raise "
                        "local_parallel.link.reconnect_seconds"
                    )
                time.sleep(TICK_SECONDS)

    def _after_the_end(self, other: int, step: int) -> tuple[int, list[str]]:
        """All steps are done, and another replica has them."""
        self.members, self._role = [self.replica], LEADS
        return step, [f"replica {other}", f"global_step{step}"]

    def _others(self) -> list[int]:
        return [r for r in range(self.num_replicas) if r != self.replica]

    def _ask_to_join(
        self, other: int, step: int, deadline: float
    ) -> tuple[int, list[str] | None] | None:
        connection = self._connect(other, "join", step)
        if connection is None:
            return None
        try:
            said, _ = read_frame(connection)
            if "refused" in said:
                raise TransportError(str(said["refused"]))
            if "wait" not in said:
                return None
            if self.replica == 0 and said["wait"] == NEW:
                return None  # number 0 forms a group, it does not wait for one
            while time.perf_counter() < deadline:
                with suppress(TimeoutError):
                    connection.settimeout(TICK_SECONDS * 5)
                    first = connection.recv(1, socket.MSG_PEEK)
                    if not first:
                        return None
                    connection.settimeout(_ANSWER_SECONDS)
                    said, _ = read_frame(connection)
                    return self._joined(other, connection, said)
        except OSError:
            return None
        finally:
            if self._role == NEW:
                connection.close()
        return None

    def _joined(
        self, leader: int, connection: socket.socket, said: dict[str, Any]
    ) -> tuple[int, list[str] | None]:
        with self._lock:
            for held, _ in self._joiners.values():
                held.close()  # they find the leader by themselves
            self._joiners.clear()
            self.members, self._epoch = list(said["members"]), int(said["epoch"])
            self._role = FOLLOWS
        if self.members[0] == leader:
            self._keep(leader, connection)
        else:
            connection.close()
        return int(said["step"]), said["state"]

    def _form(self, step: int) -> tuple[int, list[str] | None] | None:
        """All are here and nobody leads: the one that has done most does."""
        with self._lock:
            if len(self._joiners) < self.num_replicas - 1:
                return None
            done = {self.replica: step} | {r: own for r, (_, own) in self._joiners.items()}
            members = sorted(done, key=lambda r: (-done[r], r))
            most = done[members[0]]
            state = [f"replica {members[0]}", f"global_step{most}"]
            self._epoch = self._last_epoch()
            self.members = members
            self._new_epoch(members)
            self._role = LEADS if members[0] == self.replica else FOLLOWS
            for replica, (connection, own) in list(self._joiners.items()):
                wanted = None if own == most else state
                said = {"members": members, "epoch": self._epoch, "step": most, "state": wanted}
                with suppress(OSError):
                    send_frame(connection, said)
                if self._role == LEADS:
                    self._keep(replica, connection)
            self._joiners.clear()
        return most, None if step == most else state

    def admit(self, step: int, save: Callable[[], list[str]]) -> None:
        """Between two steps: take in who waits. For the leader; others return at once.

        Args:
            step: that the members have done.
            save: writes the leader's state, and gives [folder, tag].
        """
        with self._lock:
            if self._role != LEADS or not self._joiners:
                return
            joiners, self._joiners = self._joiners, {}
        state = save()
        with self._lock:
            self._new_epoch([*self.members, *sorted(joiners)])
            for replica, (connection, _) in joiners.items():
                said = {
                    "members": self.members,
                    "epoch": self._epoch,
                    "step": step,
                    "state": state,
                }
                with suppress(OSError):
                    send_frame(connection, said)
                self._keep(replica, connection)
                say(f"replica {replica} of {self.place.name} is back from step {step + 1} on")

    # --- who is there -----------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        return self.place.timeout_seconds + self.place.reconnect_seconds

    @property
    def _reach(self) -> float:
        return self.place.reconnect_seconds

    def _connect(self, other: int, kind: str, step: int) -> socket.socket | None:
        card = self.place.read_card(other)
        if "port" not in card:
            return None
        try:
            connection = socket.create_connection((card["host"], card["port"]), _ANSWER_SECONDS)
            mind(connection, self.place.reconnect_seconds)
            hello = {"kind": kind, "replica": self.replica, "step": step}
            send_frame(connection, hello | {"secret": card["secret"], "facts": self.place.facts})
        except OSError:
            return None
        return connection

    def _role_of(self, other: int) -> str | None:
        """What it is, or "dead"; None where it cannot be reached."""
        card = self.place.read_card(other)
        if "port" not in card:
            return "dead"
        try:
            with socket.create_connection((card["host"], card["port"]), _ANSWER_SECONDS) as asked:
                send_frame(
                    asked,
                    {
                        "kind": "look",
                        "replica": self.replica,
                        "step": 0,
                        "secret": card["secret"],
                        "facts": self.place.facts,
                    },
                )
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

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_ANSWER_SECONDS)
            mind(connection, self.place.reconnect_seconds)
            hello, _ = read_frame(connection)
            if not hmac.compare_digest(str(hello["secret"]), self._secret):
                connection.close()
                return
            if hello["facts"] != self.place.facts:
                refused = (
                    f"the replicas of {self.place.name} were not started with the same model, data "
                    "and configuration; start all with the same"
                )
                send_frame(connection, {"refused": refused})
                connection.close()
                return
            self._welcome(connection, str(hello["kind"]), int(hello["replica"]), int(hello["step"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            LOG.debug("no answer to a replica: %r", error)
            connection.close()

    def _welcome(self, connection: socket.socket, kind: str, replica: int, step: int) -> None:
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
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
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
        """The members are others from now on, if nobody else has said so first."""
        number = self._epoch + 1
        text = json.dumps({"members": members, "by": self.replica}) + "\n"
        path = self.place.folder / f"epoch-{number:06d}.json"
        try:
            with path.open("x") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            raise TransportError(
                f"the other replicas of {self.place.name} took replica {self.replica} for dead and "
                "went on; it begins again with their weights"
            ) from None
        self.members, self._epoch = members, number
        for old in range(number - 20, number - 10):  # enough to see what happened
            with suppress(OSError):
                (self.place.folder / f"epoch-{old:06d}.json").unlink()
