"""The folder of a campaign: tiny inputs, the fork server, undisturbed runs, and the command line of
a run."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fork_client import Server
from judging import Outcome, left_by

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


class Bench:
    """A folder with inputs, and the fork server."""

    def __init__(self, server: Server, work: Path) -> None:
        self.server, self.work = server, work
        self.data = work / "data"
        self._count = 0
        self._case = "case"
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
            shape: what is otherwise in the model's config; None takes a key away, here and in
                settings.
            options: of the command line, underscores for dashes; None takes one away, True gives
                one without a value.
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
    """JSON content with other values at some paths; None takes a key away, a number is a position
    in a list."""
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
