"""A run folder: what its run was, whether this start may go on with it, and what is kept of both.

run.json describes the newest start at its top level; its list "starts" keeps every one, and
"weights" where the run's first weights came from. A start that differs from what the run was is
refused, unless it says so by name (`--allow-change`).
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ds_local.checkpoints.facts import FACTS, read_facts
from ds_local.checkpoints.folder import complete_tags, locate, newest_tag
from ds_local.checkpoints.metrics_file import METRICS_FILE
from ds_local.checkpoints.run_file import RUN_FILE, run_facts
from ds_local.config import strict_json
from ds_local.config.changes import CHANGES
from ds_local.errors import CheckpointError, DataError, RunError
from ds_local.outputs import FILES, reason, scratch_name, write_whole
from ds_local.schedules.units import unit_folders
from ds_local.training.differences import UNKNOWN, by_kind, differences, in_words, of_checkpoint
from ds_local.training.run_lock import RunLock

_OF_OTHER_FOLDERS = (FILES, FACTS, "latest")  # of data and models, checkpoints, folders of these
_MADE = (
    RUN_FILE,
    METRICS_FILE,
    "checkpoints",
    "logs",
    "loss.png",
    "diagnostics.png",
    "report.html",
    "profile.json",
    "trace.json",
)
# of a start, in the list of all
_KEPT = ("arguments", "config", "data", "versions", "machine")


class RunFolder:
    """The folder of a run, for one start.

    Args:
        path: of the folder.
        say: told what a user should know.
        is_first: this rank keeps the books; other hosts may have nothing but checkpoints.
    """

    def __init__(self, path: str | Path, say: Callable[[str], None], is_first: bool = True) -> None:
        self.path, self.is_first = Path(path), is_first
        self.checkpoints = self.path / "checkpoints"
        self.say = say
        self.lock = RunLock(self.path, say)
        self.changed: list[str] = []  # kinds of changes that this start was allowed

    # --- what there is ---------------------------------------------------------------------------

    def begins_at(self, resume: bool) -> str | None:
        """The checkpoint that a start goes on from; None: it begins at step 0.

        Raises:
            RunError: when it would run over something.
            CheckpointError: when the file `latest` is damaged.
        """
        if resume:
            tag = newest_tag(self.checkpoints)
            if tag is not None:
                return tag
            if unit_folders(self.path):
                raise RunError(
                    f"{self.path} holds runs of units but no checkpoint of the whole pipeline; "
                    f"make one with ds-local gather {self.path}, or start units with --unit"
                )
        elif complete_tags(self.checkpoints) or (self.checkpoints / "latest").exists():
            raise RunError(
                f"{self.path} already holds a run; add --resume to continue it, or choose another "
                "--output"
            )
        if self.is_first and self.recorded() is None:
            ours = [name for name in _OF_OTHER_FOLDERS if (self.path / name).exists()]
            if ours:
                raise RunError(
                    f"{self.path} holds {', '.join(ours)}: it is no folder of a run but one of "
                    "data, a model or checkpoints; give --output the run's own folder"
                )
            foreign = [name for name in _MADE if (self.path / name).exists()]
            if foreign:
                raise RunError(
                    f"{self.path} holds {', '.join(foreign)} but no run of ds_local, so it is left "
                    "alone; choose another --output"
                )
        return None

    def recorded(self) -> dict[str, Any] | None:
        """run.json; None where there is none that a run has written."""
        facts = run_facts(self.path)
        return facts if "arguments" in facts else None

    # --- what it was -----------------------------------------------------------------------------

    def check_same(
        self,
        tag: str,
        now: Mapping[str, Any],
        allowed: Collection[str],
        same_tokenizer: Callable[[Path], bool],
    ) -> None:
        """Compare a start with the run that it goes on with.

        Args:
            tag: of the checkpoint.
            now: "config", "model", "data", "layout" as run.json has them.
            allowed: kinds of changes that the user names.
            same_tokenizer: is the tokenizer in a folder that of the data?

        Raises:
            RunError: naming all that changed, and the flag.
        """
        was = self.recorded()
        if was is None and not self.is_first:
            return
        old = by_kind(was) if was else of_checkpoint(read_facts(locate(self.checkpoints, tag)))
        new = by_kind(now)
        absent = dict.fromkeys(old["settings"].keys() | new["settings"].keys(), "not set")
        old["settings"], new["settings"] = absent | old["settings"], absent | new["settings"]
        copy = self.checkpoints / "tokenizer"
        if None in (old["tokenizer"]["fingerprint"], new["tokenizer"]["fingerprint"]):
            same = copy.is_dir() and same_tokenizer(copy)
            old["tokenizer"]["fingerprint"] = f"of {copy}" if copy.is_dir() else UNKNOWN
            new["tokenizer"]["fingerprint"] = f"of {copy}" if same else "that of the data"
        changes = {kind: differences(old[kind], new[kind]) for kind in new}
        self.changed = [kind for kind in CHANGES if changes.get(kind)]
        refused = [kind for kind in self.changed if kind not in allowed]
        if refused:
            lost = "" if was else " (its run.json is missing or damaged)"
            told = "; ".join(f"{kind}: {in_words(changes[kind])}" for kind in refused)
            raise RunError(
                f"{self.path} does not go on as it was{lost}, {told}; change it back, or add "
                f"--allow-change {','.join(refused)}"
            )
        if was and changes["settings"]:
            self.say(
                f"settings that changed since the last start: {in_words(changes['settings'])}; the "
                "optimizer keeps the values of the checkpoint, all else follows the new ones"
            )

    # --- what is kept ----------------------------------------------------------------------------

    def start(self, facts: Mapping[str, Any], step: int, tag: str | None, tokenizer: Path) -> None:
        """Write down a start, on the first rank; from here on the folder is a run's.

        Args:
            facts: of run.json, "weights" being those that the model was built with.
            step: optimizer steps done.
            tag: of the checkpoint that it goes on from.
            tokenizer: folder to keep a copy of.

        Raises:
            RunError: when it cannot be written.
        """
        if not self.is_first:
            return
        was = self.recorded()
        starts = [] if was is None else was.get("starts") or [_kept(was)]
        own = {
            "step": step,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "checkpoint": tag,
            "weights": facts["weights"],
            "changed": self.changed,
            **_kept(facts),
        }
        origin = was.get("weights") if was is not None and tag is not None else facts["weights"]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._set_aside(RUN_FILE, was is None, "run.damaged.json")
            text = {**facts, "weights": origin, "starts": [*starts, own]}
            write_whole(self.path / RUN_FILE, strict_json.dumps(text, indent=1, default=str) + "\n")
            self._set_aside(METRICS_FILE, tag is None, f"metrics-start-{len(starts)}.jsonl")
            self.checkpoints.mkdir(exist_ok=True)  # a folder without run.json is not known again
            self._keep_tokenizer(tokenizer)
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {reason(error, self.path)}; make room, or choose "
                "another --output"
            ) from error

    def _set_aside(self, name: str, condition: bool, new_name: str) -> None:
        path = self.path / name
        if condition and path.exists():
            self.say(f"{path} is of an earlier start; kept as {new_name}")
            path.rename(path.with_name(new_name))

    def _keep_tokenizer(self, folder: Path) -> None:
        """Copy the data's tokenizer beside the checkpoints, whole or not at all."""
        copy, content = self.checkpoints / "tokenizer", _content(folder)
        if copy.is_dir() and _content(copy) == content:
            return
        scratch = copy.with_name(scratch_name(copy.name))
        try:
            for name, text in content.items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_bytes(text)
            if copy.exists():
                shutil.rmtree(copy)
            scratch.rename(copy)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@contextmanager
def opened(
    path: str | Path, is_first: bool, say: Callable[[str], None], locks: bool = True
) -> Iterator[RunFolder]:
    """The folder of a run, locked by the first rank while this lasts, unless it is only looked at.

    Raises:
        RunError: when another process has it.
    """
    run = RunFolder(path, say, is_first)
    try:
        if is_first and locks:
            run.lock.acquire()
        yield run
    finally:
        run.lock.release()


def _kept(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in _KEPT if key in facts}


def _content(folder: Path) -> dict[str, bytes]:
    """What is in the files of a folder, by their names in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tokenizer_test(check: Callable[[Path, Path], bool], folder: Path) -> Callable[[Path], bool]:
    """Is the tokenizer in another folder that in `folder`? By their files, else by `check`, which
    raises DataError when it is not."""

    def same(other: Path) -> bool:
        if _content(other) == _content(folder):
            return True
        try:
            return check(other, folder)
        except (DataError, OSError, ValueError, CheckpointError):
            return False

    return same
