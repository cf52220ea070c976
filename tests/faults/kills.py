"""SIGKILL of a random rank at a random moment; then the same command again.

Right: the others end in time, name the dead rank and blame no living one, no process stays, and the restarted run ends with
the weights and the figures of an undisturbed one, bit for bit.
"""

from __future__ import annotations

import random
import signal
import time
from typing import Any

from judging import (
    LAYOUTS,
    MIX,
    Bench,
    Outcome,
    blamed,
    differences,
    ended,
    last_words,
    left_by,
)

OTHERS_END = 45.0  # seconds, for a rank to notice that another one died: the start's and the links' limits are below it


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    """Layouts by turns; one case in three is killed twice."""
    found = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        stages, replicas = LAYOUTS[layout]
        kills = [
            (rng.randrange(stages * replicas), rng.random())
            for _ in range(1 + (rng.random() < 1 / 3))
        ]
        found.append({"layout": layout, "kills": [list(kill) for kill in kills]})
    return found


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    stages, replicas = LAYOUTS[case["layout"]]
    ranks = stages * replicas
    arguments = {"settings": MIX, "num_stages": stages}
    wanted, usual_seconds = bench.reference(f"kills {case['layout']}", ranks, **arguments)
    folder = bench.folder()
    outcome = Outcome()
    for rank, moment in case["kills"]:
        command = bench.arguments(folder, **arguments, **bench.resuming(folder))
        run = bench.server.start("train.py", command, ranks=ranks)
        time.sleep(max(0.0, run.began + moment * usual_seconds - time.monotonic()))
        run.signal(signal.SIGKILL, rank)
        killed = time.monotonic()
        outcome.wrong += ended(run, OTHERS_END)
        outcome.seconds = max(outcome.seconds, time.monotonic() - killed)
        outcome.wrong += blamed(run, rank)
        outcome.expect(not run.close(), "processes stayed")
    command = bench.arguments(folder, **arguments, **bench.resuming(folder))
    run = bench.server.finish("train.py", command, ranks=ranks)
    if any(run.statuses()):
        outcome.wrong.append(f"not resumed: statuses {run.statuses()}, {last_words(run.outputs())}")
    else:
        outcome.wrong += differences(left_by(folder / "run"), wanted)
    return outcome
