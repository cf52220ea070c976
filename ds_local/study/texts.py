"""The data folders of the quality study."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from ds_local.errors import DataError
from ds_local.outputs import write_file
from ds_local.study.recipes import PACKAGES, Preset

# whose Python files make the text PACKAGES; without transformers, whose models repeat each other
# line by line
TEXT_OF = (
    "torch",
    "sympy",
    "pandas",
    "numpy",
    "matplotlib",
    "networkx",
    "deepspeed",
    "mypy",
    "fonttools",
    "pygments",
    "pip",
)
_POLL_SECONDS = 1.0


def prepared(preset: Preset, folder: Path, deadline: float) -> Path | None:
    """The data of a preset, in `folder`; made if it is not there. None when another process was
    still making it at the deadline (of `time.monotonic`).

    Raises:
        DataError: when it cannot be made.
    """
    packages = preset.source == PACKAGES
    kind, length = "packages" if packages else "study", preset.model["n_positions"]
    data = folder / f"{kind}-{preset.tokenizer.partition(':')[2]}-{length}"
    folder.mkdir(exist_ok=True)
    with (folder / f"{data.name}.lock").open("w") as file:
        while not try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_SECONDS)
        if not (data / "prepared.json").exists():
            source = str(package_text(folder)) if packages else preset.source
            _prepare(source, preset.tokenizer, length, data)
    return data


def try_lock(file: int) -> bool:
    """Lock a file for this process. False when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prepare(source: str, tokenizer: str, length: int, data: Path) -> None:
    """Make a data folder, in a process of its own: what it needs is free again when it ends."""
    command = [sys.executable, "-m", "ds_local", "prepare", "--source", source]
    command += ["--tokenizer", tokenizer, "--seq-len", str(length), "--output", str(data)]
    if subprocess.run(command, check=False).returncode:
        raise DataError(f"{data} could not be made from {source}; see above")


def package_text(folder: Path) -> Path:
    """Write the Python files of TEXT_OF, one JSON line each and none twice, in an order that
    depends on their names alone.

    Beside it lies packages.json: versions, the number of files and bytes, a checksum, and every
    file with its own.

    Raises:
        DataError: when one of the packages is not installed.
    """
    files: dict[str, bytes] = {}
    versions = {}
    for package in TEXT_OF:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            raise DataError(f"the text is made of {package}, among others; install it") from None
        versions[package] = distribution.version
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if file.suffix == ".py" and not {"test", "tests"} & set(file.parts) and path.is_file():
                files[file.as_posix()] = path.read_bytes()
    sums = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files, key=_shuffled)}
    first = {checksum: name for name, checksum in reversed(sums.items())}
    kept = {name: checksum for name, checksum in sums.items() if first[checksum] == name}
    texts = (files[name].decode("utf-8", errors="ignore") for name in kept)
    text = folder / "packages.jsonl"
    write_file(text, "".join(json.dumps({"text": one}) + "\n" for one in texts))
    facts = {
        "packages": versions,
        "files": len(kept),
        "bytes": sum(len(files[name]) for name in kept),
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "file_sha256": kept,
    }
    write_file(folder / "packages.json", json.dumps(facts, indent=1) + "\n")
    return text


def _shuffled(name: str) -> str:
    """Sorts files of all packages among each other: the first validation sequences must not be of
    one package."""
    return hashlib.sha256(name.encode()).hexdigest()
