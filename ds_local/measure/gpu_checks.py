"""What else one device can show in its time: the tests that need one, and a study of quality."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

CHECKOUT = Path(__file__).parents[2]
METHODS = (
    "backprop",
    "local",
    "chunked 2",
    "chunked 2, run ahead",
    "chunked 2, backprop tail 40 %",
)
RUN = ("method", "segments", "seed", "step_factor")  # what tells runs of a preset apart
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")


def rows_of_tests(args: argparse.Namespace) -> Iterator[Row]:
    """tests/gpu of this checkout, as pytest counts them; nothing where there is none."""
    if not (CHECKOUT / "tests" / "gpu").is_dir():
        print("the tests are in a checkout, not in an installed package", file=sys.stderr)
        return
    few = ["-k", "one_process and local"] if args.dry_run else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *few]
    began = time.perf_counter()
    ended = _run(command, args, CHECKOUT)
    lines = ended.stdout.splitlines() or [f"pytest said nothing and ended with {ended.returncode}"]
    found = {what: int(count) for count, what in _COUNT.findall(lines[-1])}
    counts = {what: found.get(what, 0) for what in ("passed", "failed", "skipped")}
    counts["failed"] += found.get("error", 0)  # before or after a test
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR "))]
    said = failed if any(counts.values()) else lines[-1:]
    print("\n".join(said), file=sys.stderr)
    seconds = time.perf_counter() - began
    yield {
        "what": "tests",
        **counts,
        "exit_code": ended.returncode,
        "seconds": seconds,
        "said": said,
    }


def methods_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the study."""
    return METHODS[:1] if args.dry_run else METHODS


def rows_of_study(args: argparse.Namespace) -> Iterator[Row]:
    """The quality study's runs of about ten million parameters, as far as the minutes go."""
    preset = "tiny" if args.dry_run else "gpu-10m"
    folder = Path(args.study_folder)
    words = ["--preset", preset, "--folder", folder, "--minutes", args.study_minutes]
    words += ["--step-factors", args.study_steps, "--methods", *methods_of(args)]
    command = [sys.executable, "-m", "ds_local", "study", "run", *map(str, words)]
    print(_run(command, args, Path.cwd()).stdout, file=sys.stderr)
    kept = (*RUN, "loss", "tokens", "seconds", "versions")
    results = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{preset}/*/result.json"))]
    for result in results:
        yield {"what": "study", "preset": preset, **{key: result[key] for key in kept}}
    if missing := missing_methods(results, args):
        print(
            f"the study is not finished, it lacks {'; '.join(missing)}. The same command with this "
            f"--study-folder ({folder}) goes on with it, for --study-minutes "
            f"{args.study_minutes:g} more",
            file=sys.stderr,
        )


def missing_methods(results: Iterable[Row], args: argparse.Namespace) -> list[str]:
    """Methods of the study without a finished run of the length that is asked for."""
    length = args.study_steps
    found = {one["method"] for one in results if one.get("step_factor", length) == length}
    return [method for method in methods_of(args) if method not in found]


def _run(
    command: list[str], args: argparse.Namespace, folder: Path
) -> subprocess.CompletedProcess[str]:
    place = {"DS_ACCELERATOR": "cpu" if args.dry_run else "cuda", "DS_LOCAL_TRY": "1"}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **place}
    return subprocess.run(
        command, check=False, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
