"""How a case is judged: what a run left, what its ranks said, who was blamed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_client import Launched, Run

TENSORS = "*.pt"  # files of a checkpoint that must not differ by a bit
FIGURES = (
    "split",
    "step",
    "segment",
    "stage",
    "loss",
    "grad_norm",
    "tokens",
)  # of metrics.jsonl, those without time
TRACEBACK = "Traceback (most recent call last)"
_ERROR = re.compile(
    r"^(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Interrupt|Exception|Stop|UnsupportedModel)\b:? .*)$",
    re.MULTILINE,
)
_USAGE = re.compile(r"^\S+: error: (.*)$", re.MULTILINE)  # argparse's
# of DeepSpeed, from another rank
LOG_LINE = re.compile(r"^\[\d{4}-\d\d-\d\d .*$", re.MULTILINE)
REFUSAL_SECONDS = 10.0


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        wrong: what should have been otherwise, in a few words each; none: the case is right.
        seconds: that the package took to answer the fault.
        said: its answer.
    """

    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    said: str = ""

    def expect(self, condition: Any, otherwise: str) -> None:
        if not condition:
            self.wrong.append(otherwise)


def left_by(run: Path) -> dict[str, Any]:
    """What a run must have left whatever happened to it: the latest checkpoint's tensors, figures
    of every step."""
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    return {
        "latest": latest.name,
        "tensors": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(latest.glob(TENSORS))
        },
        "figures": figures_of(run),
    }


def tree_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def figures_of(run: Path, split: str | None = None) -> list[str]:
    """Rows of metrics.jsonl without what depends on time, each as JSON, in a fixed order."""
    rows = (row for row in metrics(run) if split in (None, row["split"]))
    return sorted(json.dumps([row.get(name) for name in FIGURES]) for row in rows)


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl, 0 before the first."""
    try:
        return max((row["step"] for row in metrics(run)), default=0)
    except ValueError:  # a line that is being written
        return 0


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In words, between what two runs left."""
    if found["latest"] != wanted["latest"]:
        return [f"it ended with {found['latest']}, not {wanted['latest']}"]
    names = [
        name for name in wanted["tensors"] if found["tensors"].get(name) != wanted["tensors"][name]
    ]
    words = (
        [f"other bits in {', '.join(names)}"]
        if names or len(found["tensors"]) != len(wanted["tensors"])
        else []
    )
    missing, more = (
        list(_counted(a) - _counted(b))
        for a, b in ((wanted["figures"], found["figures"]), (found["figures"], wanted["figures"]))
    )
    if missing or more:
        words.append(
            f"metrics.jsonl: {len(missing)} rows missing, {len(more)} unexpected, such as "
            f"{(missing + more)[0]}"
        )
    return words


def _counted(rows: Iterable[str]) -> set[tuple[str, int]]:
    """Rows with the number of their occurrence, so that a doubled one shows."""
    seen: dict[str, int] = {}
    counted = set()
    for row in rows:
        seen[row] = seen.get(row, 0) + 1
        counted.add((row, seen[row]))
    return counted


def last_words(output: str) -> str:
    """The sentence that a rank ended with."""
    found = _ERROR.findall(output) or _USAGE.findall(output)
    return found[-1] if found else ""


def refused(run: Run, names: Sequence[str]) -> Outcome:
    """Judge a run that has to be refused: in one sentence with one of the names, in time, with
    nothing left running."""
    outcome = Outcome()
    if not run.wait_as_launchers_do(6 * REFUSAL_SECONDS):
        outcome.wrong.append(f"no end within {6 * REFUSAL_SECONDS:.0f} s")
    outcome.seconds = run.ended - run.began
    outcome.expect(not run.close(), "processes stayed")
    output, status = run.outputs(), run.status(0)
    # ranks may say the same
    sentences = list(dict.fromkeys(_ERROR.findall(output) or _USAGE.findall(output)))
    if not sentences and len(lines := output.strip().splitlines()) == 1:
        sentences = lines
    outcome.said = sentences[0][:400] if sentences else ""
    if not any(run.statuses()):
        return Outcome(["accepted"], outcome.seconds)
    outcome.expect(outcome.seconds <= REFUSAL_SECONDS, f"took {outcome.seconds:.1f} s")
    outcome.expect(TRACEBACK not in output, f"a traceback: {last_words(output)[:300]}")
    outcome.expect(status != 0, "rank 0 ended with status 0")
    if TRACEBACK in output:
        return outcome
    if len(sentences) != 1:
        outcome.wrong.append(
            f"{len(sentences)} sentences: {' | '.join(sentences)[:400] or output[-400:]}"
        )
    elif after := LOG_LINE.sub("", output.rpartition(sentences[0])[2]).strip():
        outcome.wrong.append(f"more than a sentence: {sentences[0][:200]} ... {after[:200]}")
    outcome.expect(
        any(name in " ".join(sentences) for name in names),
        f"names none of {', '.join(names)}: {outcome.said}",
    )
    return outcome


def ended(run: Run | Launched, seconds: float, ranks: Sequence[int] | None = None) -> list[str]:
    """Wait for the end of ranks. What is wrong if they do not end: who still runs."""
    if run.wait(seconds, ranks):
        return []
    alive = [rank for rank in run.alive() if ranks is None or rank in ranks]
    return [f"ranks {', '.join(map(str, alive))} still run after {seconds:.0f} s"]


def blamed(run: Run, dead: int) -> list[str]:
    """What is wrong with what the survivors of a rank said. Who had finished by then need not say
    anything."""
    wrong = []
    for rank, status in enumerate(run.statuses()):
        if rank == dead or status == 0:
            continue
        said = last_words(run.output(rank))
        if status != 1:
            wrong.append(
                f"rank {rank} ended with status {status}: {said or run.output(rank)[-300:]}"
            )
        elif f"rank {dead}" not in named(said):
            wrong.append(f"rank {rank} does not name the dead rank {dead}: {said}")
        elif living := [
            other for other in named(said) if other not in (f"rank {dead}", f"rank {rank}")
        ]:
            wrong.append(f"rank {rank} blames {', '.join(living)}, dead is {dead}: {said}")
    return wrong


def named(sentence: str) -> list[str]:
    """Ranks whom a sentence calls gone, as "rank 3"."""
    return list(dict.fromkeys(f"rank {number}" for number in re.findall(r"\brank (\d+)", sentence)))
