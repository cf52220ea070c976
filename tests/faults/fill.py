"""No room: the disk full, nearly full, out of inodes, or read-only, while a run saves, at its
start, while data is prepared and while a model is exported. The disk is a small tmpfs of its own,
so this needs root.

Right, in a run: a sentence with the path (and bytes, where bytes are missing), the older checkpoint
whole, the partial one gone, training goes on, and the next save works once there is room, so that
the run ends as if nothing had been. Elsewhere: refused in one sentence with the path, and nothing
is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fork_client import Run, wait_for
from judging import TRACEBACK, Outcome, differences, ended, last_words, left_by, refused, tree_of
from workbench import LAYOUTS, MIX, Bench, finished_run

DISK_BYTES, INODES = 24 << 20, 2000
NEARLY = 100_000  # bytes left for a line of metrics, but not for a checkpoint
STEPS, SAVE_EVERY = 60, 6
WHATS = ("run", "run", "start", "prepare", "export")
HOWS = ("nearly full", "full", "no inodes", "read-only")
_BYTES = re.compile(r"\d[\d,.]* ?(?:bytes|[kKMG]i?B)\b")


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"fill {seed}")
    pairs = [(what, how) for what in WHATS for how in HOWS]
    found = []
    for number in range(count):
        what, how = pairs[number % len(pairs)]
        found.append(
            {
                "what": what,
                "how": how,
                "layout": rng.choice(("2x1", "2x2")),
                "after": rng.randrange(1, 4),
            }
        )
    return found


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    folder = bench.folder()
    with small_disk(folder / "disk") as disk:
        if case["what"] == "run":
            return _run(bench, case, folder, disk)
        return _refused(bench, case, folder, disk)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},nr_inodes={INODES}", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-R", "-l", str(place)], check=True)


def _mount(*arguments: str) -> None:
    result = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(
            f"cannot mount a disk to fill, which needs root: {result.stderr.strip()}"
        )


@contextlib.contextmanager
def no_room(disk: Path, how: str, below: Path) -> Iterator[None]:
    """Within it nothing more can be written to the disk; `below` is what becomes read-only."""
    if how == "read-only":
        _mount("--bind", str(below), str(below))
        _mount("-o", "remount,bind,ro", str(below))
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(below)], check=True)
        return
    ballast = disk / "ballast"
    ballast.mkdir()
    if how == "no inodes":
        _until_full(lambda number: (ballast / str(number)).touch())
    else:
        with (ballast / "bytes").open("wb", buffering=0) as file:
            _until_full(lambda number: file.write(bytes(4096)))
            if how == "nearly full":
                file.truncate(file.tell() - NEARLY)
    try:
        yield
    finally:
        subprocess.run(["rm", "-rf", str(ballast)], check=True)


def _until_full(write: Any) -> None:
    for number in range(10**6):
        try:
            write(number)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return


def _run(bench: Bench, case: dict[str, Any], folder: Path, disk: Path) -> Outcome:
    stages, replicas = LAYOUTS[case["layout"]]
    options = {
        "settings": MIX,
        "num_stages": stages,
        "max_steps": STEPS,
        "save_every": SAVE_EVERY,
        "eval_every": 0,
    }
    wanted, _ = bench.reference(f"fill {case['layout']}", stages * replicas, **options)
    run_folder = disk / "run"
    checkpoints = run_folder / "checkpoints"
    command = bench.arguments(folder, output=run_folder, **options)
    run = bench.server.start("train.py", command, ranks=stages * replicas)
    first = checkpoints / "latest"
    wait_for(lambda: _step(first) >= case["after"] * SAVE_EVERY or not run.alive(), 120)
    outcome = Outcome()
    if not first.exists():
        run.close()
        return Outcome([f"it did not save: {run.outputs()[-300:]}"])
    began = time.monotonic()
    with no_room(disk, case["how"], checkpoints):
        said = wait_for(
            lambda: _complaint(run, run_folder, case["how"]) or not run.alive(), 60, 0.05
        )
        outcome.seconds = time.monotonic() - began
        outcome.said = said if isinstance(said, str) else ""
        outcome.expect(
            outcome.said, f"no sentence with the path: {last_words(run.outputs())[:300]}"
        )
        if run.alive():
            wait_for(lambda: not _whole(checkpoints) or not run.alive(), 10, 0.05)  # it tidies up
            outcome.wrong += _whole(checkpoints)
    outcome.wrong += ended(run, 120)
    outcome.expect(not run.close(), "processes stayed")
    outcome.expect(TRACEBACK not in run.outputs(), "a traceback")
    if any(run.statuses()):
        outcome.wrong.append(f"training did not go on: {last_words(run.outputs())[:300]}")
        return outcome
    found = left_by(run_folder)
    if case["how"] == "full":  # metrics cannot be written either
        found["figures"] = wanted["figures"]
    outcome.wrong += differences(found, wanted) + _whole(checkpoints)
    return outcome


def _step(latest: Path) -> int:
    try:
        return int(latest.read_text().removeprefix("global_step"))
    except (FileNotFoundError, ValueError):
        return 0


def _complaint(run: Run, folder: Path, how: str) -> str:
    """The line that says what is wrong, once it is there."""
    for line in run.outputs().splitlines():
        if str(folder) in line and ("full" not in how or _BYTES.search(line)):
            return line[:400]
    return ""


def _whole(checkpoints: Path) -> list[str]:
    """What is wrong with a folder of checkpoints between two saves."""
    latest = checkpoints / (checkpoints / "latest").read_text()
    wrong = (
        []
        if (latest / "ds_local.json").exists()
        else [f"latest names {latest.name}, which is not whole"]
    )
    partial = [path.name for path in checkpoints.iterdir() if "partial" in path.name]
    return wrong + ([f"{', '.join(partial)} was left"] if partial else [])


def _refused(bench: Bench, case: dict[str, Any], folder: Path, disk: Path) -> Outcome:
    below = disk / "below"
    below.mkdir()
    output = below / "out"
    if case["what"] == "start":
        script, ranks = "train.py", 2
        command = bench.arguments(folder, MIX, output=output, max_steps=2)
    elif case["what"] == "prepare":
        script, ranks = "prepare_data.py", 1
        command = [
            "--source",
            str(bench.work / "text.txt"),
            "--tokenizer",
            str(bench.data / "tokenizer"),
        ]
        command += ["--seq-len", "16", "--output", str(output)]
    else:
        script, ranks = "export_hf.py", 1
        command = [str(finished_run(bench)), "--output", str(output)]
    # a line of metrics would fit, and so does a small folder
    how = "full" if case["how"] == "nearly full" and case["what"] == "start" else case["how"]
    with no_room(disk, how, below):
        outcome = refused(bench.server.start(script, command, ranks=ranks), [str(below)])
        if outcome.wrong != ["accepted"]:
            left = [name for name in tree_of(below) if "/logs/" not in name]
            outcome.expect(not left, f"left behind: {', '.join(left)[:200]}")
            outcome.expect(
                "full" not in how or _BYTES.search(outcome.said), f"no bytes in: {outcome.said}"
            )
    return outcome
