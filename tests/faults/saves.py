"""SIGKILL of a rank at every single file operation of a save: of the first save of all, of one
beside an older one, and of one under a tag that there was already. And at operations on the run
folder during a whole run of train.py.

Right: what is loaded afterwards is one whole save, older or newer, the same on all ranks, and there
is always one where there was one before; the next save works. A run of train.py goes on to the
weights and figures of an undisturbed one.
"""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

from fork_client import HERE, Run
from judging import Outcome, differences, ended, last_words, left_by
from workbench import MIX, Bench

RANKS = 2
KINDS = ("first", "other", "again")
SHARE_OF_TRAINING = 4  # one case in so many is a whole run of train.py, where not all can be played
SCRIPT = str(HERE / "save_script.py")
OTHERS_END = 45.0


def cases(seed: int, count: int, bench: Bench) -> list[dict[str, Any]]:
    """Every operation of every rank in the three kinds of saves, then operations of a run; `count`
    of them."""
    rng = random.Random(f"saves {seed}")
    saves = [
        {"kind": kind, "rank": rank, "operation": operation}
        for kind in KINDS for rank in range(RANKS)
        for operation in range(1, operations(bench, kind, rank) + 1)
    ]  # fmt: skip
    if count < len(saves):
        rng.shuffle(saves)
    runs = [
        {"kind": "train", "rank": rank, "operation": operation}
        for rank in range(RANKS) for operation in range(1, operations(bench, "train", rank) + 1)
    ]  # fmt: skip
    rng.shuffle(runs)
    taken = min(len(saves), max(count - count // SHARE_OF_TRAINING, count - len(runs)))
    return saves[:taken] + runs[: count - taken]


def operations(bench: Bench, kind: str, rank: int) -> int:
    """How many there are, from an undisturbed run that is made once."""
    if not _count_file(bench, kind, rank).exists():
        folder = bench.folder("counting")
        hooks = {r: [("kill_at_operation", _hook(folder, kind, 0))] for r in range(RANKS)}
        for r in range(RANKS):
            hooks[r][0][1]["count_file"] = str(_count_file(bench, kind, r))
        run = _start(bench, folder, kind, hooks)
        problems = ended(run, 60)
        if problems or any(run.statuses()):
            raise RuntimeError(f"the undisturbed {kind} failed: {problems} {run.outputs()[-2000:]}")
        for r in range(RANKS) if kind != "train" else ():
            saved = re.findall(r"^SAVED (\d+ \w+)$", run.output(r), re.MULTILINE)
            _digest_file(bench, kind, r).write_text("\n".join(saved))
    return int(_count_file(bench, kind, rank).read_text())


def _count_file(bench: Bench, kind: str, rank: int) -> Path:
    return bench.work / f"operations-{kind}-{rank}.txt"


def _digest_file(bench: Bench, kind: str, rank: int) -> Path:
    return bench.work / f"digests-{kind}-{rank}.txt"


def _hook(folder: Path, kind: str, number: int) -> dict[str, Any]:
    training = kind == "train"
    below = folder / ("run" if training else "saves")
    return {"folder": str(below), "number": number, "armed": training}


def _start(bench: Bench, folder: Path, kind: str, hooks: Any, what: str = "save") -> Run:
    if kind == "train":
        return bench.server.start(
            "train.py", bench.arguments(folder, MIX), ranks=RANKS, hooks=hooks
        )
    bench.arguments(folder)  # writes the two config files
    argv = [
        what,
        str(folder / "saves"),
        str(folder / "model.json"),
        str(folder / "ds_config.json"),
        kind,
    ]
    return bench.server.start(SCRIPT, argv, ranks=RANKS, hooks=hooks)


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    kind, rank = case["kind"], case["rank"]
    if kind == "train":
        return _of_a_run(bench, case)
    operations(bench, kind, rank)  # what an undisturbed run saves
    folder = bench.folder()
    hooks = {rank: [("kill_at_operation", _hook(folder, kind, case["operation"]))]}
    run = _start(bench, folder, kind, hooks)
    outcome = _died(run, rank)
    loaded = _start(bench, folder, kind, {}, what="load")
    outcome.wrong += ended(loaded, 60)
    outcome.expect(not loaded.close(), "processes stayed")
    if any(loaded.statuses()):
        outcome.wrong.append(f"loading failed: {last_words(loaded.outputs())[:300]}")
        return outcome
    found = [
        re.findall(r"^FOUND (\d+) (\w+)$", loaded.output(r), re.MULTILINE) for r in range(RANKS)
    ]
    saved = [_digest_file(bench, kind, r).read_text().splitlines() for r in range(RANKS)]
    if not any(found):
        refusals = re.findall(r"^REFUSED (.*)$", loaded.outputs(), re.MULTILINE)
        outcome.expect(kind == "first", f"no checkpoint is left: {refusals[:1]}")
        return outcome
    steps = {one[0][0] if one else None for one in found}
    outcome.expect(len(steps) == 1, f"ranks found different saves: {found}")
    for r, one in enumerate(found):
        whole = bool(one) and " ".join(one[0]) in saved[r]
        outcome.expect(whole, f"rank {r} found something else than was saved: {one}")
    outcome.said = f"found step {', '.join(map(str, steps))}"
    return outcome


def _died(run: Run, rank: int) -> Outcome:
    outcome = Outcome(ended(run, 60, [rank]))
    outcome.expect(run.status(rank) == -9, f"the rank was not killed: status {run.status(rank)}")
    killed = time.monotonic()
    outcome.wrong += ended(run, OTHERS_END)
    outcome.seconds = time.monotonic() - killed
    outcome.expect(not run.close(), "processes stayed")
    return outcome


def _of_a_run(bench: Bench, case: dict[str, Any]) -> Outcome:
    wanted, _ = bench.reference("saves", RANKS, settings=MIX)
    folder = bench.folder()
    hook = _hook(folder, "train", case["operation"])
    run = _start(bench, folder, "train", {case["rank"]: [("kill_at_operation", hook)]})
    outcome = _died(run, case["rank"])
    again = bench.server.finish("train.py", bench.arguments(folder, MIX, resume=True), ranks=RANKS)
    if any(again.statuses()):
        outcome.wrong.append(f"not resumed: {last_words(again.outputs())[:300]}")
    else:
        outcome.wrong += differences(left_by(folder / "run"), wanted)
    return outcome
