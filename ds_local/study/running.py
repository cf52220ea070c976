"""Train the runs of the quality study that are not finished yet, one after the other."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ds_local.checkpoints.metrics_file import METRICS_FILE, MetricsFile
from ds_local.checkpoints.run_file import run_facts
from ds_local.config import strict_json
from ds_local.outputs import write_file
from ds_local.outputs.checkpoint_names import step_of
from ds_local.study.beginnings import leave_trunk
from ds_local.study.methods import DECAY, METHODS, TAILS, WSD
from ds_local.study.recipes import PRESETS
from ds_local.study.runs import CHECKPOINTS, Run, ds_config
from ds_local.study.texts import prepared, try_lock

EVALUATED_TOKENS = 65536  # of the validation split
_SAVE_SECONDS = 120  # for a run that is asked to save and leave


def work(args: argparse.Namespace) -> int:
    """Train what is not finished yet and nobody else works on, for `args.minutes`. Returns the exit
    status: 1 when a run failed."""
    deadline = time.monotonic() + args.minutes * 60
    folder = Path(args.folder, args.preset)
    folder.mkdir(parents=True, exist_ok=True)
    data = prepared(PRESETS[args.preset], Path("data"), deadline)
    if data is None:
        print("another process still prepares the data; call again")
        return 0
    runs = [
        Run(args.preset, method, segments, seed, factor, steps)
        for seed in args.seeds
        for factor in args.lr_factors
        for steps in args.step_factors
        for segments in args.segments
        for method in args.methods
    ]
    elsewhere = []
    for run in runs:
        place = folder / run.name
        place.mkdir(exist_ok=True)
        with (place / "lock").open("w") as lock:
            mine = try_lock(lock.fileno())
            finished = (place / "result.json").exists()
            if not mine and not finished:
                elsewhere.append(run.name)
            elif not finished and not _train(run, place, data, deadline):
                return 0 if time.monotonic() >= deadline else 1
    if elsewhere:
        print(f"another process trains {', '.join(elsewhere)}; call again")
    else:
        print("all of these runs are finished")
    return 0


def _train(run: Run, place: Path, data: Path, deadline: float) -> bool:
    """Train until done or out of time. True when done."""
    write_file(place / "model.json", json.dumps(PRESETS[run.preset].model))
    write_file(place / "ds_config.json", json.dumps(ds_config(run), indent=1))
    if not (place / "run").exists():
        leave_trunk(run, place)
        if METHODS[run.method].renew and not (place / "run").exists():
            print(f"{run.name}: run the same without its tail first", file=sys.stderr)
            return False
    code = _call_train(_command(run, place, data), place / "log.txt", deadline)
    if code:
        print(f"{run.name}: failed, see {place / 'log.txt'}", file=sys.stderr)
        return False
    rows = MetricsFile(place / "run" / METRICS_FILE).read()
    if code is None or rows[-1]["step"] < run.steps:  # or somebody else asked it to stop
        print(f"{run.name}: to be continued")
        return False
    result = result_of(run, rows, run_facts(place / "run"))
    write_file(place / "result.json", strict_json.dumps(result, indent=1))
    thin_out(run, place / "run" / "checkpoints")
    print(f"{run.name}: {result['loss']:.4f}")
    return True


def _command(run: Run, place: Path, data: Path) -> list[str]:
    options = {
        "--model": place / "model.json",
        "--data": data,
        "--output": place / "run",
        "--max-steps": run.steps,
        "--eval-every": max(1, run.steps // 10),
        "--save-every": max(1, run.steps // CHECKPOINTS),
        "--eval-sequences": EVALUATED_TOKENS // PRESETS[run.preset].model["n_positions"],
        "--deepspeed_config": place / "ds_config.json",
        "--allow-change": "scheme",
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "ds_local", "train", *words, "--resume"]


def _call_train(command: list[str], log: Path, deadline: float) -> int | None:
    """The exit status of a run of one process; None when it was out of time, has saved and left."""
    environment = {
        # threads of two runs on the same cores cost ten times what they bring
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # a free one; nobody else comes
    }
    with log.open("a") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            return process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(_SAVE_SECONDS)
            return None
        finally:
            process.kill()  # if it is still there


def result_of(run: Run, rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """What a finished run leaves in result.json.

    Args:
        rows: of its metrics.jsonl.
        facts: its run.json.
    """
    method = METHODS[run.method]
    validation = [row for row in rows if row["split"] == "validation"]
    last = [row for row in validation if row["segment"] == run.segments - 1]
    since = run.switch(method.tail) if method.renew else 0  # before it was another model
    curve = [(row["tokens"], row["loss"]) for row in last if row["step"] > since]
    seconds = [row["seconds"] for row in rows if row["split"] == "train"]
    return {
        **run._asdict(),
        "loss": curve[-1][1],
        "curve": curve,
        "exits": {r["segment"]: r["loss"] for r in validation if r["step"] == run.steps},
        "tokens": rows[-1]["tokens"],
        "parts": facts["layout"]["segment_parts"],
        "versions": facts["versions"],
        "machine": facts["machine"],
        "data": facts["data"]["fingerprint"],
        "seconds": seconds[-1] if seconds else None,
    }


def thin_out(run: Run, checkpoints: Path) -> None:
    """Remove the checkpoints that no other run begins with."""
    method = METHODS[run.method]
    needed = {run.steps}
    if not method.tail:
        needed |= {run.switch(tail) for tail in TAILS}
    if method.schedule == WSD:
        needed.add(run.switch(DECAY))
    for checkpoint in checkpoints.glob("*"):
        step = step_of(checkpoint.name)
        if step is not None and step not in needed:
            shutil.rmtree(checkpoint)
