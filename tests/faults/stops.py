"""Told to stop, and stopped: SIGTERM, SIGINT and SIGHUP to one rank or to all, under real launchers
too; a second SIGINT; the launcher gone; and SIGSTOP of a rank in a step, a save, an evaluation or
the start.

Right: told to stop, all ranks save the same step and are gone within 30 s with the same status, and
the run goes on from there as if nothing had been. After a second SIGINT they are gone at once. A
rank that hangs is named while the others wait, and when their limits end them; no living rank is
blamed.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from typing import Any

from fork_client import Launched, Run, wait_for
from judging import TRACEBACK, Outcome, blamed, ended, figures_of, last_step, last_words
from workbench import LAYOUTS, MIX, Bench

LEAVE_SECONDS = 30.0
AT_ONCE_SECONDS = 8.0
WARN, TIMEOUT, START = 2.0, 8.0, 6.0  # limits of runs in which a rank hangs
SLACK = 15.0  # seconds beyond a limit, for words to go round
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
PLACES = ("train_batch", "save_checkpoint", "eval_batch", "start", "group")
# of a hundred cases
SHARES = {"told": 45, "hangs": 25, "twice": 8, "early": 8, "no launcher": 6, "launcher told": 8}
REFERENCE_STEPS = 40


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"stops {seed}")
    turns = dict.fromkeys(SHARES, 0)
    found = []
    for kind in rng.choices(list(SHARES), list(SHARES.values()), k=count):
        turn = turns[kind]
        turns[kind] += 1
        layout = "2x1" if kind == "launcher told" else rng.choice(list(LAYOUTS))
        stages, replicas = LAYOUTS[layout]
        case: dict[str, Any] = {
            "kind": kind,
            "layout": layout,
            "rank": rng.randrange(stages * replicas),
        }
        if kind in ("told", "launcher told", "early"):
            case["signal"] = SIGNALS[turn % 3]
        if kind == "told":
            case["to"] = ("one", "all")[turn // 3 % 2]
        if kind == "launcher told":
            case["launcher"] = ("torchrun", "deepspeed")[turn // 3 % 2]
        if kind == "hangs":
            case["in"] = PLACES[turn % len(PLACES)]
        case["after"] = round(rng.random(), 3) if kind == "early" else rng.randrange(1, 9)
        found.append(case)
    return found


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    return {"hangs": _hangs, "early": _early}.get(case["kind"], _told)(bench, case)


# --- told to stop ---------------------------------------------------------------------------------


def _told(bench: Bench, case: dict[str, Any]) -> Outcome:
    stages, replicas = LAYOUTS[case["layout"]]
    folder, ranks = bench.folder(), stages * replicas
    wanted = _reference(bench, case["layout"])
    options = {"num_stages": stages, "save_every": 0, "eval_every": 0}
    command = bench.arguments(folder, MIX, max_steps=100_000, **options)
    by_launcher = case["kind"] == "launcher told"
    run: Run | Launched
    if by_launcher:
        run = Launched(folder, case["launcher"], command, ranks)
    else:
        run = bench.server.start("train.py", command, ranks=ranks)
    outcome = Outcome()
    wait_for(lambda: last_step(folder / "run") >= case["after"] or not run.alive(), 120, 0.05)
    if last_step(folder / "run") < case["after"]:
        run.close()
        return Outcome([f"it does not train: {run.outputs()[-500:]}"])
    _tell(run, case)
    told = time.monotonic()
    outcome.wrong += ended(run, AT_ONCE_SECONDS if case["kind"] == "twice" else LEAVE_SECONDS)
    outcome.seconds = time.monotonic() - told
    outcome.expect(not run.close(), "processes stayed")
    if case["kind"] == "twice" or outcome.wrong:
        return outcome
    statuses = set(run.statuses())
    outcome.said = f"status {statuses}"
    if not by_launcher and case["kind"] != "no launcher":
        number = signal.Signals[case["signal"]]
        outcome.expect(
            statuses in ({0}, {128 + number}),
            f"statuses {run.statuses()}: {last_words(run.outputs())[:200]}",
        )
    outcome.expect(
        by_launcher or TRACEBACK not in run.outputs(),
        f"a traceback: {last_words(run.outputs())[:200]}",
    )
    latest = folder / "run" / "checkpoints" / "latest"
    if not latest.exists():
        outcome.wrong.append("nothing was saved")
        return outcome
    step = int(latest.read_text().removeprefix("global_step"))
    outcome.expect(
        step >= last_step(folder / "run"),
        f"saved at step {step}, trained to {last_step(folder / 'run')}",
    )
    command = bench.arguments(folder, MIX, max_steps=step + 2, resume=True, **options)
    resumed = bench.server.finish("train.py", command, ranks=ranks)
    if any(resumed.statuses()):
        outcome.wrong.append(f"not resumed: {last_words(resumed.outputs())[:300]}")
        return outcome
    steps = min(step + 2, REFERENCE_STEPS)
    found = [row for row in figures_of(folder / "run", "train") if json.loads(row)[1] <= steps]
    due = [row for row in wanted if json.loads(row)[1] <= steps]
    outcome.expect(
        found == due,
        f"other figures than in an undisturbed run: {len(set(due) ^ set(found))} rows differ",
    )
    return outcome


def _tell(run: Run | Launched, case: dict[str, Any]) -> None:
    kind = case["kind"]
    if kind == "no launcher":
        run.signal_launcher(signal.SIGKILL)
    elif kind == "launcher told":
        run.signal_launcher(signal.Signals[case["signal"]])
    elif kind == "twice":
        run.signal(signal.SIGINT)
        time.sleep(0.3)
        run.signal(signal.SIGINT)
    else:
        run.signal(signal.Signals[case["signal"]], case["rank"] if case["to"] == "one" else None)


def _reference(bench: Bench, layout: str) -> list[str]:
    """Figures of the training steps of an undisturbed run, made once."""
    stages, replicas = LAYOUTS[layout]
    folder = bench.work / f"long-{layout}"
    if not (folder / "run" / "loss.png").exists():
        folder.mkdir(exist_ok=True)
        options = {
            "max_steps": REFERENCE_STEPS,
            "num_stages": stages,
            "save_every": 0,
            "eval_every": 0,
        }
        run = bench.server.finish(
            "train.py", bench.arguments(folder, MIX, **options), 120, ranks=stages * replicas
        )
        if any(run.statuses()):
            raise RuntimeError(f"the undisturbed run failed: {run.outputs()[-3000:]}")
    return figures_of(folder / "run", "train")


def _early(bench: Bench, case: dict[str, Any]) -> Outcome:
    """Told to stop before training has begun: it only has to end."""
    stages, replicas = LAYOUTS[case["layout"]]
    folder = bench.folder()
    command = bench.arguments(folder, MIX, num_stages=stages)
    run = bench.server.start("train.py", command, ranks=stages * replicas)
    time.sleep(case["after"])
    run.signal(signal.Signals[case["signal"]])
    told = time.monotonic()
    outcome = Outcome(ended(run, LEAVE_SECONDS))
    outcome.seconds = time.monotonic() - told
    outcome.expect(not run.close(), "processes stayed")
    return outcome


# --- a rank that hangs ----------------------------------------------------------------------------


def _hangs(bench: Bench, case: dict[str, Any]) -> Outcome:
    stages, replicas = LAYOUTS[case["layout"]]
    folder, ranks, rank = bench.folder(), stages * replicas, case["rank"]
    settings = {
        **MIX, "local_parallel.link.warn_seconds": WARN, "local_parallel.link.timeout_seconds": TIMEOUT,
        "local_parallel.layout.start_timeout_seconds": START,
    }  # fmt: skip
    options = {"num_stages": stages, "max_steps": 20, "save_every": 4, "eval_every": 6}
    nth = case["after"] if case["in"] == "train_batch" else 1
    hooks = {rank: [("stop_in", {"where": case["in"], "nth": nth})]}
    run = bench.server.start(
        "train.py", bench.arguments(folder, settings, **options), ranks=ranks, hooks=hooks
    )
    wait_for(lambda: run.is_stopped(rank) or not run.alive(), 60)
    if not run.is_stopped(rank):
        run.close()
        return Outcome([f"the rank did not come to {case['in']}: {run.outputs()[-300:]}"])
    stopped = time.monotonic()
    others = [other for other in range(ranks) if other != rank]
    limit = TIMEOUT + SLACK + (START if case["in"] == "group" else 0)  # both are waited for there
    outcome = Outcome(ended(run, limit, others))
    outcome.seconds = time.monotonic() - stopped
    run.signal(signal.SIGKILL, rank)
    run.wait(5)
    outcome.wrong += blamed(run, rank)
    if case["in"] not in ("start", "group"):
        warnings = [
            line
            for line in run.outputs().splitlines()
            if re.search(rf"\brank {rank}\b", line) and "Error" not in line
        ]
        outcome.expect(warnings, f"nobody names rank {rank} before the limit")
        outcome.said = (warnings or [""])[0][:300]
    outcome.expect(not run.close(), "processes stayed")
    return outcome
