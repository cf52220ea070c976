"""How fast prepare_data.py is, and how much memory it takes, beside `datasets.map`.

    python scripts/measure_data.py --megabytes 64 --systems prepare datasets --workers 1 2
    python scripts/measure_data.py --megabytes 128 1024 --systems prepare --workers 2

The corpus is the Python source of the installed packages, a file a JSON line, repeated where it is
too short. `datasets` is what run_clm.py does: load, `map` to token ids, `map` to sequences, save.
Each runs in a process of its own, with its children, a thread in each. Memory is that of all of
them together, looked at ten times a second: what they hold themselves, and with the pages of files
that they have open.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from ds_local.cli.arguments import Parser, whole

SEQ_LEN = 512
TOKENIZER = "sentencepiece:4096"

MAP = """
import itertools, sys
import datasets
from transformers import AutoTokenizer

corpus, folder, output, workers, length = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
tokenizer = AutoTokenizer.from_pretrained(folder)
end = [tokenizer.eos_token_id]

def tokenize(batch):
    ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
    return {"input_ids": [one + end for one in ids["input_ids"]]}

def group(batch):
    ids = list(itertools.chain.from_iterable(batch["input_ids"]))
    whole = len(ids) // length * length
    return {"input_ids": [ids[i : i + length] for i in range(0, whole, length)]}

rows = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=output + "/cache")
how = {"batched": True, "remove_columns": rows.column_names, "num_proc": workers}
tokens = rows.map(tokenize, **how)
tokens.map(group, batched=True, num_proc=workers).save_to_disk(output + "/saved")
"""


class Figures(NamedTuple):
    """`cpu`: seconds of processors; `held`, `with_files`: the most memory, in bytes."""

    system: str
    workers: int
    megabytes: int
    seconds: float
    cpu: float
    held: int
    with_files: int


def write_corpus(path: Path, size: int) -> None:
    """`size` bytes of JSON lines."""
    written = 0
    with path.open("w") as file:
        while written < size:
            for line in _lines():
                written += file.write(line)
                if written >= size:
                    return


def _lines() -> Iterator[str]:
    for root in sorted({sysconfig.get_paths()[name] for name in ("purelib", "platlib")}):
        for source in sorted(Path(root).rglob("*.py")):
            text = source.read_text(errors="replace")
            if text.strip():
                yield json.dumps({"text": text}) + "\n"


def measure(command: list[str]) -> tuple[float, float, int, int]:
    """(seconds, those of processors, the most memory held, the same with pages of files) of a
    command."""
    start, used = time.perf_counter(), _cpu_of_children()
    held = with_files = 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        )
        while process.poll() is None:
            own, whole = _memory(process.pid)
            held, with_files = max(held, own), max(with_files, whole)
            time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {said.read()[-2000:]}")
    return time.perf_counter() - start, _cpu_of_children() - used, held, with_files


def _cpu_of_children() -> float:
    """Of those that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of a process and its children, shared ones counted once: (their own, with files')."""
    try:
        root = psutil.Process(pid)
        pids = [pid, *(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0, 0
    own = whole = 0
    for one in pids:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        sizes = {line.split()[0]: int(line.split()[1]) << 10 for line in lines if " kB" in line}
        own += sizes.get("Pss_Anon:", 0)
        whole += sizes.get("Pss:", 0)
    return own, whole


def run(args: argparse.Namespace, folder: Path) -> Iterator[Figures]:
    """The figures of every system, one after another on the same corpus."""
    prepare = [sys.executable, "-m", "ds_local", "prepare", "--seq-len", str(SEQ_LEN)]
    small, tokenizer = folder / "small.jsonl", folder / "small" / "tokenizer"
    write_corpus(small, 8 << 20)
    measure(
        [*prepare, "--source", str(small), "--tokenizer", TOKENIZER, "--output", f"{folder}/small"]
    )
    for megabytes in args.megabytes:
        corpus = folder / f"{megabytes}.jsonl"
        write_corpus(corpus, megabytes << 20)
        for workers in args.workers:
            for system in args.systems:
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    commands = {
                        "prepare": [
                            *(*prepare, "--source", str(corpus), "--tokenizer", str(tokenizer)),
                            *("--workers", str(workers), "--output", f"{output}/data"),
                        ],
                        "datasets": [
                            *(sys.executable, "-c", MAP, str(corpus), str(tokenizer), output),
                            *(str(workers), str(SEQ_LEN)),
                        ],
                    }
                    yield Figures(system, workers, megabytes, *measure(commands[system]))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--megabytes", type=whole(1), nargs="+", default=[64], help="of the corpus")
    parser.add_argument(
        "--systems", nargs="+", choices=["prepare", "datasets"], default=["prepare", "datasets"]
    )
    parser.add_argument("--workers", type=whole(1), nargs="+", default=[1, 2])
    parser.add_argument("--folder", default=None, help="for corpus and outputs; emptied at the end")
    args = parser.parse_args(arguments)
    print("| system | processes | corpus, MB | seconds | CPU seconds | held, MB | with files, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for one in run(args, Path(folder)):
            print(
                f"| {one.system} | {one.workers} | {one.megabytes} | {one.seconds:.0f} | "
                f"{one.cpu:.0f} | {one.held / 1e6:.0f} | "
                f"{one.with_files / 1e6:.0f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
