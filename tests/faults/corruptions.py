"""Damage to the files of a run that is to be resumed: bits, bytes, whole files and edited JSON of a
checkpoint, the pointer to it, run.json, and the data's prepared.json.

Right: refused in one sentence that names the file or what differs in it, before a weight changes;
nothing in the run folder but logs changes, and no code in a file runs. A damaged line of
metrics.jsonl is set aside: the run goes on with all other rows.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hooks import TOUCHED
from judging import Outcome, ended, last_words, refused, tree_of
from workbench import FINISHED_STEPS, MIX, SAVED_EVERY, Bench, finished_run

# how many of a hundred cases damage what
SHARES = {"tensors": 40, "facts": 24, "latest": 9, "prepared": 12, "run": 6, "metrics": 9}

# --- damages: bytes -> bytes, at a place given as a share of the file -----------------------------


def _flipped(content: bytes, at: float) -> bytes:
    position = min(int(at * len(content)), len(content) - 1)
    return (
        content[:position]
        + bytes([content[position] ^ (1 << position % 8)])
        + content[position + 1 :]
    )


def _zeroed(content: bytes, at: float) -> bytes:
    start = int(at * len(content) * 0.9)
    return content[:start] + bytes(len(content[start : start + 64])) + content[start + 64 :]


BYTES: dict[str, Callable[[bytes, float], bytes]] = {
    "a bit": _flipped,
    "zeros": _zeroed,
    "cut off": lambda content, at: content[: int(at * len(content))],
    "empty": lambda content, at: b"",
    "longer": lambda content, at: content + b"\0" * 16,
    "doubled": lambda content, at: content * 2,
    "noise": lambda content, at: random.Random(at).randbytes(len(content)),
}
FILES = (
    "gone",
    "of another name",
    "of an older step",
    "a folder",
    "pickled code",
    "pickled code, sealed",
)
TEXTS: dict[str, bytes] = {
    "empty": b"", "spaces": b" \n", "null": b"null\n", "a list": b"[]\n", "a number": b"12\n", "words": b"hello\n",
    "no UTF-8": b"\xff\xfe\x00{", "NaN": b"NaN\n", "deep": b"[" * 100_000, "long": b"a" * 10**6,
}  # fmt: skip
POINTERS: dict[str, bytes] = {
    "empty": b"", "spaces": b"  \n", "no UTF-8": b"\xff\xfeglobal", "NUL": b"global_step6\0", "long": b"g" * 10**6,
    "not there": b"global_step7", "above": b"../checkpoints/global_step6", "absolute": b"/etc",
    "partial": b"global_step6.partial",
    "two lines": b"global_step3\nglobal_step6", "JSON": b'{"tag": "global_step6"}', "a dot": b".",
}  # fmt: skip
# what edits of JSON change: in ds_local.json everything, in prepared.json what reading it relies on
PREPARED_KEYS = (
    "format",
    "seq_len",
    "vocab_size",
    "eos_token_id",
    "sequences",
    "sequences.train",
    "fingerprint",
)
EDITS = ("gone", "null", "another type", "another value")


def _edited(value: Any, edit: str) -> Any:
    if edit == "null":
        return None
    if edit == "another type":
        return 7 if isinstance(value, str | list | dict) else "seven"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return value[:-1] if isinstance(value, list) and value else {"unknown": 1}


def _paths(content: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Of all keys, from the top down."""
    if not isinstance(content, dict):
        return []
    here = [(*above, key) for key in content]
    return here + [path for key, value in content.items() for path in _paths(value, (*above, key))]


def _at(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content[key]
    return content


def _edit_file(path: Path, keys: tuple[str, ...], edit: str) -> None:
    content = json.loads(path.read_text())
    at = _at(content, keys[:-1])
    if edit == "gone":
        del at[keys[-1]]
    else:
        at[keys[-1]] = _edited(at[keys[-1]], edit)
    path.write_text(json.dumps(content, indent=1))


# --- cases ----------------------------------------------------------------------------------------


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"corruptions {seed}")
    kinds: dict[str, list[str]] = {
        "tensors": [*BYTES, *FILES],
        "facts": ["gone", *BYTES, *TEXTS, *(f"edit: {edit}" for edit in EDITS * 6)],
        "latest": [*POINTERS],
        "prepared": ["gone", *BYTES, *TEXTS, *(f"edit: {edit}" for edit in EDITS * 4)],
        "run": ["empty", "cut off", "null", "a list", "words", "no UTF-8"],
        "metrics": [
            "a line cut off",
            "a line of noise",
            "an empty line",
            "a line without keys",
            "the last line cut off",
        ],
    }
    what = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    turns = {name: rng.sample(found, len(found)) for name, found in kinds.items()}
    found = []
    for number, name in enumerate(what):
        kind = turns[name][
            what[:number].count(name) % len(turns[name])
        ]  # every kind before any again
        found.append(
            {
                "what": name,
                "kind": kind,
                "which": round(rng.random(), 6),
                "at": round(rng.random(), 6),
            }
        )
    return found


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    folder = bench.folder()
    run, data = folder / "run", folder / "data"
    shutil.copytree(finished_run(bench), run)
    shutil.copytree(bench.data, data)
    canary = folder / "canary"
    names = damage(case, run, data, canary)
    before = tree_of(run)
    command = bench.arguments(
        folder, MIX, data=data, max_steps=FINISHED_STEPS + 2, save_every=SAVED_EVERY, resume=True
    )
    hooks = {rank: [("watch_loading", {})] for rank in range(2)}
    started = bench.server.start("train.py", command, ranks=2, hooks=hooks)
    if case["what"] == "metrics":
        return _set_aside(started, run, before["metrics.jsonl"], case)
    outcome = refused(started, names)
    outcome.expect(TOUCHED not in started.outputs(), "refused after weights had changed")
    outcome.expect(not canary.exists(), "code in a file ran")
    if outcome.wrong != ["accepted"]:
        after = tree_of(run)
        changed = [
            name
            for name in before
            if after.get(name) != before[name] and not name.startswith("logs/")
        ]
        outcome.expect(not changed, f"the refusal changed {', '.join(changed)}")
    return outcome


def damage(case: dict[str, Any], run: Path, data: Path, canary: Path) -> list[str]:
    """Do it. Returns names of which the refusal must have one."""
    latest = run / "checkpoints" / f"global_step{FINISHED_STEPS}"
    tensors = sorted(latest.glob("*.pt"))
    which = tensors[int(case["which"] * len(tensors))]
    path = {
        "tensors": which, "facts": latest / "ds_local.json", "latest": run / "checkpoints" / "latest",
        "prepared": data / "prepared.json", "run": run / "run.json", "metrics": run / "metrics.jsonl",
    }[case["what"]]  # fmt: skip
    names = [path.name] + {"prepared": [str(data)], "facts": [latest.name]}.get(case["what"], [])
    kind = case["kind"]
    if case["what"] == "metrics":
        _damage_line(path, kind, case["at"])
    elif kind.startswith("edit: "):
        content = json.loads(path.read_text())
        paths = (
            [tuple(key.split(".")) for key in PREPARED_KEYS]
            if case["what"] == "prepared"
            else _paths(content)
        )
        if kind == "edit: null":  # of what is not null already
            paths = [keys for keys in paths if _at(content, keys) is not None]
        keys = paths[int(case["which"] * len(paths))]
        _edit_file(path, keys, kind.removeprefix("edit: "))
        names.append(keys[-1])
    elif kind == "gone":
        path.unlink()
    elif case["what"] == "tensors" and kind in FILES:
        _replace(path, kind, latest, canary)
    else:
        texts = POINTERS if case["what"] == "latest" else TEXTS
        whole = (
            texts[kind]
            if kind in texts and case["what"] != "tensors"
            else BYTES[kind](path.read_bytes(), case["at"])
        )
        path.write_bytes(whole)
    return names


class _Code:
    """Pickled, it makes a file when somebody reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _replace(path: Path, kind: str, folder: Path, canary: Path) -> None:
    old = path.read_bytes()
    if kind == "of another name":
        others = [other for other in sorted(folder.glob("*.pt")) if other.read_bytes() != old]
        path.write_bytes(others[0].read_bytes())
    elif kind == "of an older step":
        path.write_bytes((folder.with_name(f"global_step{SAVED_EVERY}") / path.name).read_bytes())
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(pickle.dumps(_Code(canary)))
        if kind.endswith("sealed"):
            _seal(folder / "ds_local.json", path, old)


def _seal(facts: Path, path: Path, old: bytes) -> None:
    """Make a forged file pass its checksum."""
    import hashlib

    text, new = facts.read_text(), path.read_bytes()
    content = json.loads(
        text.replace(hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest())
    )
    content["files"][path.name] = [len(new), hashlib.sha256(new).hexdigest()]
    facts.write_text(json.dumps(content, indent=1))


def _damage_line(path: Path, kind: str, at: float) -> None:
    lines = path.read_text().splitlines()
    number = len(lines) - 1 if kind.startswith("the last") else int(at * len(lines))
    lines[number] = {
        "a line of noise": "\x01\x02 noise", "an empty line": "", "a line without keys": "{}",
    }.get(kind, lines[number][: len(lines[number]) // 2])  # fmt: skip
    path.write_text("\n".join(lines) + ("" if kind.startswith("the last") else "\n"))


def _set_aside(started: Any, run: Path, before: bytes, case: dict[str, Any]) -> Outcome:
    outcome = Outcome(ended(started, 60), 0.0)
    outcome.seconds = started.ended - started.began
    outcome.expect(not started.close(), "processes stayed")
    if any(started.statuses()):
        outcome.wrong.append(f"not resumed: {last_words(started.outputs())}")
        return outcome
    kept, damaged = [], []
    for line in before.decode().splitlines():
        try:
            kept.append(json.loads(line)["step"] and line)
        except (ValueError, KeyError):
            damaged += [line] if line else []
    now = (run / "metrics.jsonl").read_text().splitlines()
    lost = [line for line in kept if json.loads(line) not in map(_loaded, now)]
    outcome.expect(not lost, f"{len(lost)} of {len(kept)} whole rows are lost")
    outcome.expect(
        all(_loaded(line) is not None for line in now), "metrics.jsonl still has damaged lines"
    )
    others = [
        path.read_text(errors="replace")
        for path in run.glob("metrics*")
        if path.name != "metrics.jsonl"
    ]
    outcome.expect(
        all(any(line in text for text in others) for line in damaged),
        "the damaged line is nowhere any more",
    )
    return outcome


def _loaded(line: str) -> Any:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "step" in found else None
