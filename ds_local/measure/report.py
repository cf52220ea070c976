"""What a benchmark has measured, as JSON, as Markdown tables and as pictures."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
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


def save(rows: Sequence[Row], path: Path | None, benchmark: str) -> None:
    """The JSON of the contract: a list of rows, each with the benchmark, command and machine it
    comes from."""
    if path is not None:
        facts = {"benchmark": benchmark, "command": command(), "machine": machine()}
        write_file(path, strict_json.dumps([facts | row for row in rows], indent=1) + "\n")


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
        commands = dict.fromkeys((row["command"], row["machine"]) for row in own)
        said = "\n".join(f"`{command}` on a {machine}" for command, machine in commands)
        loads = [row["load_before"] for row in own if "load_before" in row]
        if loads:
            said += f"\n(load average while it ran: {min(loads):.1f} to {max(loads):.1f})"
        texts += [said, *TABLES[benchmark](own)]
    return "\n\n".join(texts)
