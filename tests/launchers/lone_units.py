"""Units of one pipeline, each a job of its own on processes of the fork server."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

import launch
from fork_client import Run, wait_for

LONG = 240  # s; nothing here waits so long, unless it waits for ever
Fate = tuple[str, int, int]  # method of the engine, its n-th call, the signal then


def dies_in(method: str, nth: int) -> Fate:
    return method, nth, signal.SIGKILL


def halts_in(method: str, nth: int) -> Fate:
    return method, nth, signal.SIGSTOP


class Units:
    """Args:
    inputs: arguments of train.py by name.
    output: of the whole run.
    ranks: of each unit.
    """

    def __init__(self, inputs: dict[str, str], output: Path, ranks: Mapping[int, int]) -> None:
        self.words = [part for pair in inputs.items() for part in pair]
        self.output, self.ranks = output, ranks
        self.runs: dict[int, Run] = {}
        self.former: list[Run] = []

    def start(self, unit: int, *fates: Fate, rank: int = 0) -> Run:
        """Args:
        rank: of the unit that the fates befall.
        """
        if unit in self.runs:
            self.former.append(self.runs[unit])
            self.runs[unit].close()
        hooks = [
            ("stop_in", dict(zip(("where", "nth", "number"), one, strict=True))) for one in fates
        ]
        words = [*self.words, "--output", str(self.output), "--resume", "--unit", str(unit)]
        self.runs[unit] = launch.fork_server().start(
            "train.py", words, self.ranks[unit], hooks={rank: hooks}
        )
        return self.runs[unit]

    def died(self, unit: int) -> None:
        """Wait for the death of a unit; its other ranks are told to end, as launchers do."""
        run = self.runs[unit]
        assert wait_for(lambda: any(run.statuses()), LONG), run.outputs()
        assert run.wait_as_launchers_do(LONG), run.outputs()
        assert signal.SIGKILL * -1 in run.statuses(), run.outputs()

    def keep_up(self) -> str:
        """Start again what dies, until all have ended well; what they said."""

        def settled() -> bool:
            dead = [unit for unit, run in self.runs.items() if any(run.statuses())]
            for unit in dead:
                self.died(unit)
                self.start(unit)
            return not dead and all(0 in run.statuses() for run in self.runs.values())

        wait_for(settled, LONG)
        return self.end()

    def end(self) -> str:
        """Wait until all have ended well; what they said."""
        for unit, run in self.runs.items():
            assert run.wait(LONG), (unit, self.said())
            assert not any(run.statuses()), (unit, self.said())
        for run in self.runs.values():
            run.close()
        return self.said()

    def said(self) -> str:
        return "".join(run.outputs() for run in [*self.former, *self.runs.values()])

    def close(self) -> None:
        for run in self.runs.values():
            run.close()

    def losses(self, unit: int) -> dict[tuple, float]:
        return launch.losses(self.output / f"unit-{unit}")
