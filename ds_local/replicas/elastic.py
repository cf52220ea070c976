"""Replicas of a stage that are jobs of their own: they average what they have, whoever is missing.

One of the members leads. In every step the others send it their gradients, it adds them up in the
order of replicas, divides by the number of those that had any, and sends the mean back. A member
that dies is left out; when the leader dies the next one leads, and a mean that some have and others
lack is passed on. A replica that comes back takes its weights from the leader between two steps.

Every change of the members is a new file, `epoch-N.json`, that only one of them can make: of two
that take each other for dead one goes on, and the other begins again. Compare torchft, whose
members meet at a server in every step.
"""

from __future__ import annotations

import queue
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_local.errors import TransportError
from ds_local.links.frames import read_frame, send_frame
from ds_local.links.logs import say
from ds_local.links.waiting import OUTSIDE, waiting
from ds_local.replicas.joining import Joining
from ds_local.replicas.members import FOLLOWS, LEADS, NEW, TICK_SECONDS


@dataclass
class Mean:
    """What a step comes to."""

    step: int
    numbers: Tensor  # [N], the sum over the members that had something, divided by their number
    present: int


_AGAIN = Mean(-1, torch.zeros(0), 0)


class ElasticGroup(Joining):
    """The mean over the replicas that are there."""

    waited, num_bytes = 0.0, 0
    _last: Mean | None = None

    # --- a step -----------------------------------------------------------------------------------

    def average(
        self, step: int, numbers: Tensor | None, size: int, final: bool = True
    ) -> Mean | None:
        """The mean over the members that have something. All of them call it.

        Args:
            step: from 0.
            numbers: [size] float32, None where this replica has nothing in this step.
            final: nor will it ever have.

        Returns:
            None: nobody has anything yet, but somebody may; try again.

        Raises:
            TransportError: when a member that lives does not come, or the others went on without
                this one.
        """
        started = time.perf_counter()
        what = f"the other replicas of {self.place.name} to average step {step + 1}"
        with waiting(OUTSIDE, what):
            try:
                found = None
                while found is None:
                    if self.members[0] == self.replica:
                        found = self._lead(step, numbers, size, final, started)
                    else:
                        found = self._follow(step, numbers, final, started)
            finally:
                self.waited += time.perf_counter() - started
        if found.step < 0:
            return None
        mean = self._last = found
        self.num_bytes += 4 * size
        return mean

    def _lead(
        self, step: int, numbers: Tensor | None, size: int, final: bool, started: float
    ) -> Mean:
        self._role = LEADS
        found: dict[int, Tensor | None] = {self.replica: numbers}
        finals = {self.replica: final}
        probed: dict[int, float] = {}
        while missing := [r for r in self.members if r not in found]:
            for replica in missing:
                early = self._early.get(replica)
                if early is None or replica not in self._connections:
                    continue
                at, ends, data = early
                if at == step:
                    found[replica], finals[replica] = data, ends
                    del self._early[replica]
                elif at > step:  # it has the mean of this step from a leader that died
                    self._send(replica, {"need": step})
                elif self._last is not None and self._last.step == at:
                    del self._early[replica]
                    self._send_mean(replica, self._last)
            missing = [r for r in self.members if r not in found]
            if not missing:
                break
            passed_on = self._next_frame(step)
            if passed_on is not None:
                return passed_on
            for replica in missing:
                if replica not in self._connections:
                    self._look_for(replica, probed)
            self._check_wait(missing[0], step, started)
        in_order = (found[replica] for replica in sorted(found))
        given = [numbers for numbers in in_order if numbers is not None]
        if not given and not all(finals[replica] for replica in found):
            for replica in self.members:
                if replica != self.replica:
                    self._send(replica, {"again": step})
            return _AGAIN
        total = given[0].clone() if given else torch.zeros(size)
        for more in given[1:]:
            total += more
        mean = Mean(step, total / max(1, len(given)), len(given))
        for replica in self.members:
            if replica != self.replica:
                self._send_mean(replica, mean)
        return mean

    def _check_wait(self, replica: int, step: int, started: float) -> None:
        """Raises TransportError when a member that lives has not come for too long."""
        if time.perf_counter() - started > self._limit:
            raise TransportError(
                f"waited for replica {replica} of {self.place.name} to average step {step + 1}, "
                f"but nothing came within {self._limit:.0f} s"
            ) from None

    def _next_frame(self, step: int) -> Mean | None:
        """Take in what has come; a mean that another member has got already."""
        try:
            replica, connection, said, data = self._frames.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return None
        contributes = self._take_in(replica, connection, said, data)
        if contributes and replica not in self.members:
            with self._lock:
                self._new_epoch([*self.members, replica])
        if said is not None and said.get("mean") == step and data is not None:
            return Mean(step, data, int(said["present"]))
        return None

    def _take_in(
        self, replica: int, connection: socket.socket, said: Any, data: Tensor | None
    ) -> bool:
        """Keep a contribution, or note that a connection is lost. Is it one? A member may send it
        before this replica knows that it leads."""
        with self._lock:
            if self._connections.get(replica) is not connection:
                return False
            if said is None:
                del self._connections[replica]
                self._early.pop(replica, None)
                return False
        if "step" in said:
            self._early[replica] = int(said["step"]), bool(said["final"]), data
        return "step" in said

    def _look_for(self, replica: int, probed: dict[int, float]) -> None:
        """Leave a member out that is dead, or was out of reach for too long."""
        now = time.perf_counter()
        first = probed.setdefault(replica, now)
        role = self._role_of(replica)
        gone = role in ("dead", NEW) or (role is None and now - first > self._reach)
        if role is not None and not gone:
            probed[replica] = now
        if gone and replica not in self._connections:
            say(f"replica {replica} of {self.place.name} is away; the others go on without it")
            with self._lock:
                self._new_epoch([r for r in self.members if r != replica])

    def _follow(
        self, step: int, numbers: Tensor | None, final: bool, started: float
    ) -> Mean | None:
        self._role = FOLLOWS
        leader = self.members[0]
        connection = self._connections.get(leader) or self._reach_leader(leader, step)
        if connection is None:
            if time.perf_counter() - started > self._limit:
                raise TransportError(
                    f"replica {leader} of {self.place.name}, which leads, does not answer"
                )
            return None
        try:
            send_frame(connection, {"step": step, "final": final}, numbers)
        except OSError:
            self._drop(leader, connection)
            return None
        while True:
            try:
                replica, at, said, data = self._frames.get(timeout=TICK_SECONDS * 5)
            except queue.Empty:
                self._check_wait(leader, step, started)
                continue
            if at is not connection:
                self._take_in(replica, at, said, data)
                continue
            if said is None:
                self._drop(leader, connection)
                return None
            if "epoch" in said:
                with self._lock:
                    if int(said["epoch"]) >= self._epoch:
                        self.members, self._epoch = list(said["members"]), int(said["epoch"])
            if "again" in said and said["again"] == step:
                return _AGAIN
            if "need" in said and self._last is not None and self._last.step == said["need"]:
                self._send_mean(leader, self._last)
            if "mean" in said and said["mean"] == step and data is not None:
                return Mean(step, data, int(said["present"]))

    def _reach_leader(self, leader: int, step: int) -> socket.socket | None:
        """Connect with it; where it is dead the next one leads, perhaps this one."""
        connection = self._connect(leader, "member", step)
        if connection is not None:
            with suppress(OSError):
                if "welcome" in read_frame(connection)[0]:
                    self._unreached = 0.0
                    self._keep(leader, connection)
                    return connection
            connection.close()
        role = self._role_of(leader)
        now = time.perf_counter()
        self._unreached = self._unreached or now
        if role in ("dead", NEW) or (role is None and now - self._unreached > self._reach):
            self._unreached = 0.0
            rest = [r for r in self.members if r != leader]
            with self._lock:
                self.members = rest
                if rest[0] == self.replica:
                    away = f"replica {leader} of {self.place.name} is away"
                    say(f"{away}; replica {self.replica} leads")
                    self._new_epoch(rest)
            return None
        if role is not None:
            self._unreached = 0.0
        time.sleep(TICK_SECONDS)
        return None

    def _send_mean(self, replica: int, mean: Mean) -> None:
        said = {
            "mean": mean.step,
            "present": mean.present,
            "members": self.members,
            "epoch": self._epoch,
        }
        self._send(replica, said, mean.numbers)
