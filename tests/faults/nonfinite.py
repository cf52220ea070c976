"""A NaN or an infinity in a loss, a gradient or an activation: at each segment, under each row of
the route table, in fp32, bf16 and bf16 with ZeRO-1; once, or from some step on; where such steps
are to be skipped, and where the run is to stop.

Right: the latest checkpoint is finite; a line on the console names the stage where it arose and the
step; metrics.jsonl stays strict JSON; skipped, the run ends with status 0; stopped, or more than
allowed in a row, all ranks end with another one.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

from fork_client import HERE
from judging import TRACEBACK, Outcome, ended, last_words
from workbench import Bench

STEPS, FIRST = 6, 3  # of a run; the first bad one
PER_STAGE = 2  # segments: four of them on two ranks, so that every row is another one
ROWS: dict[str, dict[str, Any]] = {
    "local": {"mode": "local"},
    "chunked": {"mode": "chunked", "window": 2},
    "overlapping": {"mode": "overlapping", "window": 2},
    "interlocking": {"mode": "interlocking", "window": 2},
    "backprop": {"mode": "backprop"},
    "mix": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
}
WITH_LOSS = {
    "local": (0, 1),
    "overlapping": (0, 1),
    "mix": (0, 1),
}  # stages with a loss; else chunk tops or the last
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 ZeRO-1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
}
# how often, and what is to come of it: (last bad step, on_nonfinite, status)
POLICIES: dict[str, tuple[int, Any, int]] = {
    "once, skipped": (FIRST, {"skip": 3}, 0),
    "twice, skipped": (FIRST + 1, {"skip": 3}, 0),
    "for good, too many": (STEPS, {"skip": 2}, 1),
    "once, stop": (FIRST, "stop", 1),
}
NOT_FINITE = re.compile(r"not finite|non-?finite|\bnan\b|\binf(?:inity)?\b", re.IGNORECASE)


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    """Row, precision and stage in all combinations before any again; the rest at random."""
    rng = random.Random(f"nonfinite {seed}")
    grid = list(itertools.product(ROWS, PRECISIONS, (0, 1)))
    found = []
    for turn in itertools.count():
        rng.shuffle(grid)
        for row, precision, stage in grid:
            losses = stage in WITH_LOSS.get(
                row, (0, 1) if row in ("chunked", "interlocking") else (1,)
            )
            kinds = ["activation", "gradient", *(["loss"] if losses else [])]
            case = {
                "row": row, "precision": precision, "stage": stage,
                "what": kinds[turn % len(kinds)] if turn else rng.choice(kinds),
                "value": rng.choice(("nan", "inf", "-inf")), "policy": rng.choice(list(POLICIES)),
                "block": rng.randrange(PER_STAGE), "micro_batch": rng.randrange(4),
            }  # fmt: skip
            if case["what"] == "loss":
                case["micro_batch"] = 0  # fewer losses than micro-batches under some rows
            found.append(case)
            if len(found) == count:
                return found
    raise AssertionError


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    folder = bench.folder()
    last, policy, status = POLICIES[case["policy"]]
    settings = {f"local_parallel.{key}": value for key, value in ROWS[case["row"]].items()}
    settings |= {"local_parallel.on_nonfinite": policy, **PRECISIONS[case["precision"]]}
    options = {
        "max_steps": STEPS,
        "save_every": 2,
        "eval_every": 0,
        "segments_per_stage": PER_STAGE,
    }
    command = bench.arguments(folder, settings, **options)
    place = {
        "first_step": FIRST,
        "last_step": last,
        "block": case["block"],
        "micro_batch": case["micro_batch"],
    }
    hooks = {case["stage"]: [("poison", {"what": case["what"], "value": case["value"], **place})]}
    run = bench.server.start("train.py", command, ranks=2, hooks=hooks)
    outcome = Outcome(ended(run, 60))
    outcome.seconds = run.ended - run.began
    outcome.expect(not run.close(), "processes stayed")
    output = run.outputs()
    for rank, found in enumerate(run.statuses()):
        outcome.expect(
            found == status,
            f"rank {rank} ended with status {found}: {last_words(run.output(rank))[:200]}",
        )
    outcome.expect(TRACEBACK not in output, f"a traceback: {last_words(output)[:200]}")
    lines = [line for line in re.split(r"[\r\n]", output) if NOT_FINITE.search(line)]
    place_named = [
        line for line in lines
        if str(case["stage"]) in re.findall(r"\bstage (\d+)", line) and str(FIRST) in re.findall(r"\bstep (\d+)", line)
    ]  # fmt: skip
    if status and not place_named:  # the step that was one too many
        last_allowed = FIRST if policy == "stop" else FIRST + policy["skip"] - 1
        place_named = [
            line
            for line in lines
            if f"step {last_allowed}" in line and f"stage {case['stage']}" in line
        ]
    outcome.said = (place_named or lines or [""])[0][:300]
    outcome.expect(
        place_named,
        f"nothing names stage {case['stage']} and step {FIRST} as not finite: {outcome.said}",
    )
    outcome.wrong += _files(bench, folder / "run", run_saved=not status)
    return outcome


def _files(bench: Bench, run: Path, run_saved: bool) -> list[str]:
    """What is wrong with a run's checkpoint and metrics."""
    wrong = []
    if (run / "checkpoints" / "latest").exists():
        looked = bench.server.finish(str(HERE / "look.py"), [str(run)])
        found = (
            json.loads(looked.outputs() or "null")
            if looked.statuses() == [0]
            else looked.outputs()[-300:]
        )
        wrong += [f"the latest checkpoint is not finite: {str(found)[:300]}"] if found else []
        latest = (run / "checkpoints" / "latest").read_text()
        if run_saved and latest != f"global_step{STEPS}":
            wrong.append(f"it ended with {latest}")
    else:
        wrong.append("no checkpoint is left")
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            json.loads(line, parse_constant=_refuse)
        except ValueError as error:
            wrong.append(f"metrics.jsonl is no strict JSON: {error}: {line[:100]}")
            break
    return wrong


def _refuse(constant: str) -> None:
    raise ValueError(constant)
