"""How a replica that is a job of its own comes to the others, at the start and after a death."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ds_local.errors import SaveError, TransportError
from ds_local.links.frames import read_frame, send_frame
from ds_local.links.logs import say
from ds_local.links.waiting import OUTSIDE, waiting
from ds_local.outputs.checkpoint_names import tag_of
from ds_local.replicas.members import ANSWER_SECONDS, FOLLOWS, LEADS, NEW, TICK_SECONDS, Members


class Joining(Members):
    """Members that take in others."""

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
        return step, [f"replica {other}", tag_of(step)]

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
                    connection.settimeout(ANSWER_SECONDS)
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
            state = [f"replica {members[0]}", tag_of(most)]
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
        try:
            state = save()
        except SaveError as error:
            say(f"no replica of {self.place.name} can come back now: {error}")
            for connection, _ in joiners.values():
                connection.close()  # it asks again
            return
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
