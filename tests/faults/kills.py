"""SIGKILL of a random rank at a random moment; then the same command again. A few under the real
launchers.

Right: the others end in time, name the dead rank and blame no living one, no process stays, and the
restarted run ends with the weights and the figures of an undisturbed one, bit for bit.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from fork_client import Launched, Run, wait_for
from judging import (
    Outcome,
    blamed,
    differences,
    ended,
    last_step,
    last_words,
    left_by,
)
from workbench import LAYOUTS, MIX, Bench

OTHERS_END = 45.0  # seconds; the limits of start and links are well below
LAUNCHED_EVERY = 25  # one case in so many goes through a real launcher


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    """Layouts by turns; one case in three is killed twice. A kill: rank, moment as a share of the
    usual time."""
    found = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        if number % LAUNCHED_EVERY == LAUNCHED_EVERY - 1:
            by = ("deepspeed", "torchrun")[number // LAUNCHED_EVERY % 2]
            found.append(
                {"layout": "2x1", "by": by, "rank": rng.randrange(2), "after": rng.randrange(1, 11)}
            )
            continue
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        stages, replicas = LAYOUTS[layout]
        kills = [
            [rng.randrange(stages * replicas), rng.random()]
            for _ in range(1 + (rng.random() < 1 / 3))
        ]
        found.append({"layout": layout, "kills": kills})
    return found


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    stages, replicas = LAYOUTS[case["layout"]]
    ranks = stages * replicas
    arguments = {"settings": MIX, "num_stages": stages}
    wanted, usual_seconds = bench.reference(f"kills {case['layout']}", ranks, **arguments)
    folder = bench.folder()
    command = bench.arguments(folder, **arguments, resume=True)
    outcome = Outcome()
    if "by" in case:
        _kill_launched(case, folder, command, outcome)
    for rank, moment in case.get("kills", ()):
        _kill(bench, folder, command, ranks, rank, moment * usual_seconds, outcome)
    run = bench.server.finish("train.py", command, ranks=ranks)
    if any(run.statuses()):
        outcome.wrong.append(f"not resumed: statuses {run.statuses()}, {last_words(run.outputs())}")
    else:
        outcome.wrong += differences(left_by(folder / "run"), wanted)
    return outcome


def _kill(
    bench: Bench, folder: Path, command: list[str], ranks: int, rank: int, seconds: float, outcome: Outcome
) -> None:  # fmt: skip
    run = bench.server.start("train.py", command, ranks=ranks)
    time.sleep(max(0.0, run.began + seconds - time.monotonic()))
    if not run.alive() and seconds > 0.5:  # faster than usual: there was nothing left to kill
        run.close()
        shutil.rmtree(folder / "run")
        return _kill(bench, folder, command, ranks, rank, seconds * 0.7, outcome)
    run.signal(signal.SIGKILL, rank)
    _after_death(run, outcome)
    outcome.wrong += blamed(run, rank)
    return None


def _kill_launched(
    case: dict[str, Any], folder: Path, command: list[str], outcome: Outcome
) -> None:
    run = Launched(folder, case["by"], command, 2)
    wait_for(lambda: last_step(folder / "run") >= case["after"] or not run.alive(), 180, 0.02)
    outcome.expect(run.alive(), f"it ended before: {run.outputs()[-500:]}")
    run.signal(signal.SIGKILL, case["rank"])
    _after_death(run, outcome)
    # the launcher may have ended the other rank before it could speak
    said = last_words(run.outputs())
    outcome.expect(
        f"rank {1 - case['rank']} is gone" not in run.outputs(),
        f"the living rank is blamed: {said}",
    )


def _after_death(run: Run | Launched, outcome: Outcome) -> None:
    killed = time.monotonic()
    outcome.wrong += ended(run, OTHERS_END)
    outcome.seconds = max(outcome.seconds, time.monotonic() - killed)
    outcome.expect(not run.close(), "processes stayed")
