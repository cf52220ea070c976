"""What a benchmark has measured, as JSON, as Markdown tables and as pictures."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from ds_local.config import strict_json
from ds_local.errors import DataError
from ds_local.measure.tables import TABLES, Row
from ds_local.outputs import write_file


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores}-core {platform.machine()} {platform.system()}{gpu}, torch {torch.__version__}"


def command() -> str:
    return shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])


@cache
def commit() -> str | None:
    """Of the checkout that this package runs from, with "+changes" where tracked files differ from
    it; None outside a checkout. As it was when first asked for."""
    root = Path(__file__).parents[2]
    where = _git(root, "rev-parse", "--show-toplevel", "--short=12", "HEAD")
    if where is None or Path(where[0]).resolve() != root.resolve():
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return where[-1] + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> list[str] | None:
    """The lines that git answers; None without git, and where it knows no answer."""
    try:
        said = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.splitlines()


def stamped(rows: Sequence[Row], benchmark: str) -> list[Row]:
    """Each row with the benchmark, command, machine, day and commit it comes from; those that were
    loaded say it already."""
    own = {
        "benchmark": benchmark,
        "command": command(),
        "machine": machine(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
    }
    return [row if "benchmark" in row else own | row for row in rows]


def save(rows: Sequence[Row], path: Path | None, benchmark: str) -> None:
    """The JSON of the contract: a list of rows, `stamped`."""
    if path is not None:
        write_file(path, strict_json.dumps(stamped(rows, benchmark), indent=1) + "\n")


def load(paths: Iterable[Path]) -> list[Row]:
    """Rows of files written by `save`.

    Raises:
        DataError: naming the file that is none.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            found = json.loads(path.read_text())
            if not all("benchmark" in row for row in found):
                raise ValueError("rows without a benchmark")
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} was not written by --json: {error}") from error
        rows += found
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Tables of all benchmarks in `rows`, each under its command and machine."""
    texts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        own = [row for row in rows if row["benchmark"] == benchmark]
        said = "\n".join(dict.fromkeys(map(_origin, own)))
        loads = [row["load_before"] for row in own if "load_before" in row]
        if loads:
            said += f"\n(load average while it ran: {min(loads):.1f} to {max(loads):.1f})"
        texts += [said, *TABLES[benchmark](own)]
    return "\n\n".join(texts)


def _origin(row: Row) -> str:
    """Rows of older files know neither day nor commit."""
    day = f", {row['date']}" if row.get("date") else ""
    commit = f", commit {row['commit']}" if row.get("commit") else ""
    return f"`{row['command']}` on a {row['machine']}{day}{commit}"
