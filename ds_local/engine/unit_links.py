"""What a unit of the pipeline, a job of its own, has to do with the units below and above it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_local.cluster.surroundings import own_address
from ds_local.config.sections import LinkConfig
from ds_local.links.agreement import gather
from ds_local.links.lasting_receiver import LastingReceiver
from ds_local.links.lasting_sender import LastingSender
from ds_local.links.line import END, Line
from ds_local.links.logs import LOG
from ds_local.links.notices import Absence, Notices
from ds_local.replicas.elastic import ElasticGroup
from ds_local.replicas.members import MeetingPlace
from ds_local.schedules.units import Unit


class WholePipeline:
    """A job that has all stages, and agrees on nothing with others: what `UnitLinks` does for a
    unit, it leaves out."""

    group = make_end = None

    def had_ended(self, step: int) -> bool:
        return False

    def join(self, step: int) -> int:
        return step

    def done(self, step: int) -> None: ...

    def arrange(self) -> None: ...

    def stop(self) -> None: ...

    def stop_soon(self) -> None: ...

    def leave_out(self, step: int, trains: bool) -> None: ...

    def end(self, finished: bool) -> None: ...

    def tell_whether_others_go_on(self, others: bool) -> None: ...


class UnitLinks:
    """This rank's links to other units, if it has some, and what must be agreed over them.

    Where a stream of messages goes on after a death is found from the top down and back: each unit
    asks the one below for the step that it needs, its own or one that a unit above still lacks, and
    is told the first step that it can have.

    Args:
        unit: of this job.
        section: "local_parallel.link".
        device: that the tensors of messages are on.
        ask_to_stop: called when a unit above wants the run to end.
        notices: by which ranks of this unit tell each other, beside the steps, what is needed no
            more.
        number: of the engine.
    """

    def __init__(
        self,
        unit: Unit,
        section: LinkConfig,
        device: torch.device,
        ask_to_stop: Callable[[], None],
        notices: Notices | None,
        number: int,
    ) -> None:
        self.unit = unit
        self._section, self._device = section, device
        self._links = Path(unit.meets_in, "links")
        self.sender: LastingSender | None = None
        self.receiver: LastingReceiver | None = None
        self._above = 0  # ranks of this unit have told that nothing before this step is needed
        self.group = self._meet_replicas() if unit.num_replicas > 1 else None
        self._topic, self._notices = f"needed/{number}", notices
        if notices is not None:
            notices.answer(self._topic, self._told)
        self._done = 0
        self._asked_to_stop = False
        self._ask_to_stop = ask_to_stop

    def _meet_replicas(self) -> ElasticGroup:
        unit = self.unit
        place = MeetingPlace(
            f"unit {unit.number}",
            self._links / f"unit-{unit.number}",
            unit.facts,
            self._section.timeout_seconds,
            self._section.reconnect_seconds,
        )
        return ElasticGroup(unit.replica, unit.num_replicas, place, own_address())

    def make_end(self, name: str, source: int, target: int) -> LastingSender | LastingReceiver:
        """Between two stages of which one is of this unit."""
        section, sends = self._section, source in self.unit.stages
        other = self.unit.number + (1 if sends else -1)
        peer = f"{self.unit.name_of(other)} (stage {target if sends else source})"
        line = Line(
            name,
            self._links / f"replica-{self.unit.replica}",
            peer,
            self.unit.facts,
            section.depth,
            section.timeout_seconds,
            section.reconnect_seconds,
            section.warn_seconds,
            self.unit.num_replicas > 1,
        )
        if sends:
            self.sender = LastingSender(line, self._device)
            self.sender.ask_to_stop = self._asked_from_above
            return self.sender
        self.receiver = LastingReceiver(line, self._device, own_address())
        return self.receiver

    def _asked_from_above(self) -> None:
        LOG.info("the unit above asks to let the run end")
        self._ask_to_stop()

    def _told(self, question: Mapping[str, Any]) -> None:
        self._above = max(self._above, int(question["step"]))

    def had_ended(self, step: int) -> bool:
        """Had this unit ended well before it was started again, and those above too? Then those
        below may be gone for good. A collective call of this unit.

        Args:
            step: that this unit has done, the last of the run.
        """
        self._done = step
        if not any(gather(self.receiver is not None and self.receiver.had_ended)):
            return False
        wanted = gather(None if self.sender is None else self.sender.wants(step))
        return all(one in (None, END) for one in wanted)

    def join(self, step: int) -> int:
        """Agree with the units below and above on where the stream goes on. A collective call of
        this unit.

        Args:
            step: that this unit has done, by its checkpoint.

        Returns:
            The step whose messages come first: a later one than `step` where messages are gone, an
            earlier one where units above have not had all of it.

        Raises:
            TransportError: when a unit does not come, or runs another configuration.
        """
        self._done = step
        wanted = gather(None if self.sender is None else self.sender.wants(step))
        first = min([step, *(one for one in wanted if one is not None)])
        begins = gather(None if self.receiver is None else self.receiver.begin_at(first))
        first = next((one for one in begins if one is not None), first)
        if self.sender is not None:
            self.sender.begin_at(first)
        return first

    def done(self, step: int) -> None:
        """This rank has done so many steps: what neither this unit nor one above needs any more is
        let go of below."""
        self._done = step
        alone = self._notices is None
        if self.receiver is not None:
            above = self._needed() if alone else self._above
            self.receiver.done_before(min(step, above))

    def _needed(self) -> int:
        return END if self.sender is None else self.sender.needed

    def arrange(self) -> None:
        """The last rank tells the first one. Called now and then, beside the main thread."""
        if self._notices is None or self._notices.rank + 1 < self._notices.world_size:
            return
        step = min(self._done, self._needed())
        self._notices.ask(0, self._topic, step=step)

    def stop(self) -> None:
        """Ask the first unit to let the run end after a step. Not where a rank of this one is gone:
        then its launcher only ends the others of this unit."""
        if self.receiver is None or self._asked_to_stop:
            return
        answers = {} if self._notices is None else self._notices.ask_all("state")
        if Absence.GONE not in answers.values():
            self._asked_to_stop = True
            self.receiver.stop()

    def stop_soon(self) -> None:
        """The same, from a signal handler."""
        threading.Thread(target=self.stop, daemon=True).start()

    def end(self, finished: bool) -> None:
        """This unit has ended well; wait for those above, which may still be started again and need
        messages. A collective call of this unit.

        Args:
            finished: all steps are done; otherwise the run was asked to stop.
        """
        if self.sender is not None:
            self.sender.drain(self._pass_on)
        gather(None)
        if self.group is not None:
            self.group.end(finished, self._done)
        if self.receiver is not None:
            self.receiver.end(finished)

    def _pass_on(self, needed: int) -> None:
        """A unit above lives, so those below need not give this one up. In a unit of several ranks
        `arrange` tells the first one."""
        if self.receiver is not None and self._notices is None:
            self.receiver.done_before(min(self._done, needed))

    def leave_out(self, step: int, trains: bool) -> None:
        """A step, or the validation before it, is done without the messages from below; tell the
        unit above that nothing of it will come."""
        if self.receiver is not None:
            self.receiver.leave_out(step, int(trains))
        if self.sender is not None:
            self.sender.send_void(step, int(trains))

    def tell_whether_others_go_on(self, others: bool) -> None:
        """Without this rank: then a unit above that is gone must not keep it waiting."""
        if self.sender is not None:
            self.sender.others_go_on = others

    @property
    def handover(self) -> Path:
        """Where the replica that leads leaves its state for one that comes back."""
        return self._links / f"unit-{self.unit.number}" / "state"
