"""What all campaigns share: tiny inputs, the command line of a run, what is left in its folder, and how a case is judged."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_client import Run, Server

MODEL = {
    "model_type": "gpt2", "n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "steps_per_print": 1, "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 2}},
    "local_parallel": {"link": {"timeout_seconds": 20.0}, "layout": {"start_timeout_seconds": 10.0}},
}  # fmt: skip
MIX = {"local_parallel.mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]}
FINISHED_STEPS, SAVED_EVERY = 6, 3  # of `finished_run`
LAYOUTS = {"2x1": (2, 1), "2x2": (2, 2), "4x1": (4, 1)}  # stages x replicas
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


class Bench:
    """A folder with inputs, and the fork server."""

    def __init__(self, server: Server, work: Path) -> None:
        self.server, self.work = server, work
        self.data = work / "data"
        self._count = 0
        self._case = "case"
        self._resumes_fresh_folders: bool | None = None
        self._references: dict[str, Any] = {}
        if not (self.data / "prepared.json").exists():
            self._prepare()
        self.vocab_size = json.loads((self.data / "prepared.json").read_text())["vocab_size"]

    def _prepare(self) -> None:
        rng = random.Random(0)
        words = ("".join(rng.choices("abcde", k=3)) for _ in range(16_000))
        text = self.work / "text.txt"
        text.write_text("\n".join(" ".join(next(words) for _ in range(40)) for _ in range(400)))
        run = self.server.finish(
            "prepare_data.py",
            [
                "--source",
                str(text),
                "--tokenizer",
                "sentencepiece:320",
                "--seq-len",
                "16",
                "--output",
                str(self.data),
            ],
        )
        if run.statuses() != [0]:
            raise RuntimeError(f"cannot prepare the data: {run.outputs()}")

    def folder(self, name: str = "") -> Path:
        """A new empty folder, of the case that is being played or of another name."""
        self._count += 1
        folder = self.work / f"{name or self._case}-{self._count}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def play(self, play: Any, case: dict[str, Any], number: int = 0, keep: bool = False) -> Outcome:
        """Play a case; its folders, case-NUMBER*, go afterwards unless it came out wrong."""
        self._case = f"case-{number:04d}"
        try:
            outcome = play(self, case)
        except Exception:  # the harness's own: the campaign goes on, the row says it
            outcome = Outcome([f"the harness failed: {traceback.format_exc()[-1500:]}"])
        if not keep and not outcome.wrong:
            for folder in self.work.glob(f"{self._case}-*"):
                shutil.rmtree(folder)
        return outcome

    def write_json(self, folder: Path, name: str, content: Any) -> Path:
        path = folder / name
        path.write_text(json.dumps(content))
        return path

    def arguments(
        self, folder: Path, settings: Mapping[str, Any] | None = None, shape: Mapping[str, Any] | None = None, **options: Any,
    ) -> list[str]:  # fmt: skip
        """The command line of train.py, with its config files written to `folder`.

        Args:
            settings: what is otherwise in ds_config.json, by path ("local_parallel.link.depth").
            shape: what is otherwise in the model's config; None takes a key away, here and in settings.
            options: of the command line, underscores for dashes; None takes one away, True gives one
                without a value.
        """
        model = with_changes({**MODEL, "vocab_size": self.vocab_size}, shape or {})
        given = {
            "model": self.write_json(folder, "model.json", model),
            "data": self.data,
            "output": folder / "run",
            "max_steps": 12,
            "eval_every": 6,
            "save_every": 3,
            "deepspeed": True,
            "deepspeed_config": self.write_json(
                folder, "ds_config.json", with_changes(SETTINGS, settings or {})
            ),
            **options,
        }
        flat: list[str] = []
        for key, value in given.items():
            name = f"--{key}" if key == "deepspeed_config" else f"--{key.replace('_', '-')}"
            if value is not None and value is not False:
                flat += [name] if value is True else [name, str(value)]
        return flat

    def resuming(self, folder: Path) -> dict[str, bool]:
        """The option that makes one command line start a run and continue it, however far it got."""
        if self._resumes_fresh_folders is None:
            fresh = self.folder("fresh")
            probe = self.server.finish(
                "train.py", self.arguments(fresh, max_steps=1, resume=True), ranks=2
            )
            self._resumes_fresh_folders = probe.statuses() == [0, 0]
        started = (folder / "run" / "checkpoints" / "latest").exists()
        return {"resume": self._resumes_fresh_folders or started}

    def reference(self, name: str, ranks: int, **arguments: Any) -> tuple[Any, float]:
        """(`left_by` an undisturbed run with these arguments, its seconds), made once."""
        if name not in self._references:
            folder = self.folder("reference")
            began = time.monotonic()
            run = self.server.finish("train.py", self.arguments(folder, **arguments), ranks=ranks)
            if any(run.statuses()):
                raise RuntimeError(f"the undisturbed run {name} failed: {run.outputs()[-3000:]}")
            self._references[name] = left_by(folder / "run"), time.monotonic() - began
        return self._references[name]


def finished_run(bench: Bench) -> Path:
    """The folder of a run of two stages with `MIX` that has two checkpoints, made once."""
    folder = bench.work / "finished"
    if not (folder / "run" / "loss.png").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = bench.arguments(folder, MIX, max_steps=FINISHED_STEPS, save_every=SAVED_EVERY)
        run = bench.server.finish("train.py", command, ranks=2)
        if any(run.statuses()):
            raise RuntimeError(f"the run to be continued failed: {run.outputs()[-3000:]}")
    return folder / "run"


def with_changes(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """JSON content with other values at some paths; None takes a key away, a number is a position in a list."""
    changed = copy.deepcopy(dict(content))
    for path, value in changes.items():
        *above, last = path.split(".")
        at: Any = changed
        for key in above:
            at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
        if value is None:
            at.pop(last, None)
        else:
            at[int(last) if isinstance(at, list) else last] = copy.deepcopy(value)
    return changed


def left_by(run: Path) -> dict[str, Any]:
    """What a run must have left whatever happened to it: the latest checkpoint's tensors, figures of every step."""
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
            f"metrics.jsonl: {len(missing)} rows missing, {len(more)} unexpected, such as {(missing + more)[0]}"
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
    """Judge a run that has to be refused: in one sentence with one of the names, in time, with nothing left running."""
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
    elif after := output.rpartition(sentences[0])[2].strip():
        outcome.wrong.append(f"more than a sentence: {sentences[0][:200]} ... {after[:200]}")
    outcome.expect(
        any(name in " ".join(sentences) for name in names),
        f"names none of {', '.join(names)}: {outcome.said}",
    )
    return outcome


def ended(run: Run, seconds: float, ranks: Sequence[int] | None = None) -> list[str]:
    """Wait for the end of ranks. What is wrong if they do not end: who still runs."""
    if run.wait(seconds, ranks):
        return []
    alive = [rank for rank in run.alive() if ranks is None or rank in ranks]
    return [f"ranks {', '.join(map(str, alive))} still run after {seconds:.0f} s"]


def blamed(run: Run, dead: int) -> list[str]:
    """What is wrong with what the survivors of a rank said. Who had finished by then need not say anything."""
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
