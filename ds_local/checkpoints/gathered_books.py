"""The books of a run that was gathered from those of its units: run.json, metrics.jsonl, and the
tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_local.checkpoints.folder import complete_tags
from ds_local.checkpoints.metrics_file import METRICS_FILE, MetricsFile
from ds_local.checkpoints.run_file import RUN_FILE, run_facts
from ds_local.config import strict_json
from ds_local.config.strict import SECTION
from ds_local.errors import CheckpointError, RunError
from ds_local.outputs import scratch_name, write_whole

GATHERED = "gathered"  # key of a run.json that no job has written


def check_free(units: Mapping[int, Sequence[Path]], output: Path) -> None:
    """In `output` is nothing, or what was gathered of the same run before.

    Args:
        units: folders of the replicas of each.

    Raises:
        RunError: when there is something else.
    """
    facts = run_facts(output)
    there = (output / RUN_FILE).exists() or complete_tags(output / "checkpoints")
    if there and GATHERED not in facts:
        raise RunError(
            f"{output} holds the run of one job, so it is left alone; choose another --output"
        )
    if not there and (output / METRICS_FILE).exists():
        raise RunError(
            f"{output} holds {METRICS_FILE} but no run of ds_local, so it is left alone; choose "
            "another --output"
        )
    before = facts.get("starts")
    known = [s for n, runs in units.items() for run in runs for s in _starts(n, run_facts(run))]
    if before and not any(start in known for start in before):
        raise RunError(
            f"{output} holds what was gathered from another run, so it is left alone; choose "
            "another --output"
        )


def write_books(step: int, runs: Sequence[Path], output: Path) -> None:
    """run.json, metrics.jsonl and the tokenizer, as one job keeps them.

    Args:
        step: of the checkpoint; what came later is left out.
        runs: folders of the units, in their order.
        output: run folder to write to.

    Raises:
        CheckpointError: when a unit's run.json cannot be read.
        OSError: when the disk does not take them.
    """
    output.mkdir(parents=True, exist_ok=True)
    facts = _run_of_whole(step, runs)
    write_whole(output / RUN_FILE, strict_json.dumps(facts, indent=1, default=str) + "\n")
    rows = [row for run in runs for row in MetricsFile(run / METRICS_FILE).read()]
    rows = [row for row in rows if row["step"] <= step]
    rows.sort(key=lambda row: (row["step"], row["split"] != "train", row["segment"]))
    text = "".join(strict_json.dumps(row) + "\n" for row in rows)
    write_whole(output / METRICS_FILE, text)
    source, copy = runs[0] / "checkpoints" / "tokenizer", output / "checkpoints" / "tokenizer"
    if source.is_dir() and not copy.is_dir():
        scratch = copy.with_name(scratch_name(copy.name))
        shutil.copytree(source, scratch)
        scratch.rename(copy)


def _run_of_whole(step: int, runs: Sequence[Path]) -> dict[str, Any]:
    """run.json: that of the first unit, with what each unit says of its stages."""
    units = [run_facts(run) for run in runs]
    if not all(units):
        damaged = runs[units.index({})] / RUN_FILE
        raise CheckpointError(f"{damaged} is missing or damaged; start that unit again")
    first = units[0]
    layout = dict(first["layout"])
    for key in ("parameters", "head_parameters"):
        layout[key] = [count for unit in units for count in unit["layout"].get(key, [])]
    layout["hosts"] = {
        stage: hosts for unit in units for stage, hosts in unit["layout"].get("hosts", {}).items()
    }
    config = json.loads(json.dumps(first["config"]))
    link = config[SECTION].pop("link", {})
    link.pop("reconnect_seconds", None)
    config[SECTION] |= {"link": link} if link else {}
    starts = [start for number, unit in enumerate(units) for start in _starts(number, unit)]
    return {
        **first,
        "arguments": {**first["arguments"], "unit": None},
        "config": config,
        "layout": layout,
        "starts": sorted(starts, key=lambda start: str(start.get("time"))),
        GATHERED: {"step": step, "runs": [str(run) for run in runs]},
    }


def _starts(number: int, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a unit."""
    return [{**start, "unit": number} for start in facts.get("starts", [])]
