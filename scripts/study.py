"""The quality study: methods on equal tokens and the same data order, one table.

    python scripts/study.py run --methods backprop local mixed --segments 4 --seeds 1 --minutes 9
    python scripts/study.py table

`run` trains what is not finished yet, all segments of a model in one process through the real
engine, and stops after the given minutes; call it again to go on. Several may run at once: each
takes runs that nobody else works on. A run that ends in backpropagation goes on from where the same
scheme without such a tail was, once that is finished: the two are the same until then. So are WSD
runs of different lengths until the shorter one decays. `table` adds what is finished to
docs/quality-runs.jsonl, one line a run, and writes docs/quality.json, docs/quality.png and the
tables in docs/quality.md, those of the presets with "ratio" in docs/quality-ratio.md.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

from ds_local.config import strict_json

ROOT = Path(__file__).resolve().parents[1]
LOCAL, BACKPROP = {"mode": "local"}, {"mode": "backprop"}
CHUNKED = {"mode": "chunked", "window": 2}


class Preset(NamedTuple):
    """A recipe in which depth matters."""

    model: dict[str, Any]
    source: str  # of prepare_data.py, or PACKAGES
    tokenizer: str
    steps: int
    sequences: int  # per step
    micro_batches: int  # per step, unless a method needs another number
    learning_rate: float
    precision: dict[str, Any]


def _gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> dict[str, Any]:
    """GPT-2's shape, its weights drawn as widely as GPT-2 small's 0.02 is for a width of 768.

    With 0.02 at a width of 64 every method learns slowly, and those that add two kinds of gradient
    suffer most.
    """
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "vocab_size": vocabulary,
        "n_positions": positions,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": round(0.02 * math.sqrt(768 / width), 3),
        "activation_function": "gelu_pytorch_tanh",  # GPT-2's function as one operation of torch's, not eight
    }


BF16 = {"bf16": {"enabled": True}}
PACKAGES = "installed packages"
# whose Python files make that text; without transformers, whose models repeat each other line by line
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
PRESETS = {
    "cpu": Preset(
        _gpt2(8, 64, 4, 512, 64), "python-stdlib", "sentencepiece:512", 3000, 32, 4, 4e-3, {}
    ),
    "cpu-large-batch": Preset(
        _gpt2(8, 64, 4, 512, 64), "python-stdlib", "sentencepiece:512", 800, 128, 4, 8e-3, {}
    ),
    "cpu-gpt2-ratio": Preset(
        _gpt2(8, 64, 2, 4096, 128), PACKAGES, "sentencepiece:4096", 1600, 64, 8, 8e-3, {}
    ),
    "cpu-ratio-32": Preset(
        _gpt2(8, 64, 2, 2048, 128), PACKAGES, "sentencepiece:2048", 1600, 64, 8, 8e-3, {}
    ),
    "tiny": Preset(
        _gpt2(4, 32, 4, 512, 32), "python-stdlib", "sentencepiece:512", 20, 8, 4, 4e-3, {}
    ),
    "gpu-10m": Preset(
        _gpt2(12, 256, 4, 4096, 256), "python-stdlib", "sentencepiece:4096", 4000, 64, 8, 2e-3, BF16
    ),
    "gpu-125m": Preset(
        _gpt2(12, 768, 12, 16384, 512),
        "python-stdlib",
        "sentencepiece:16384",
        4000,
        128,
        8,
        6e-4,
        BF16,
    ),
}

TRIAL = "tiny"  # to try the script; `table` leaves it out


def mixed(share: float, rest: dict[str, Any] = LOCAL, correction: float = 0.0) -> dict[str, Any]:
    """A share of each step's micro-batches runs backpropagation; `section_of` fills in how many
    these are."""
    return {"mix": [{"mode": "backprop", "share": share}, rest], "correction": correction}


COSINE, WSD = "cosine", "WSD"  # warm-up, stable, decay: a line to nothing over the last part
DECAY = 0.2  # of the steps of a WSD run


class Method(NamedTuple):
    """A scheme, the share of the steps at the end that follow another one, and the options of the
    heads."""

    scheme: dict[str, Any]
    tail: float = 0.0
    head: Mapping[str, Any] = MappingProxyType({})
    micro_batches: int | None = None
    end: dict[str, Any] = BACKPROP  # the scheme of the tail
    schedule: str = COSINE  # of the learning rate
    renew: str = ""  # what the segments above the first chunk begin the tail with, instead of what they have learnt


EIGHTH = {"token_fraction": 0.125}
QUARTER = {"token_fraction": 0.25}
SHARED = {"readout": "shared", "temperature": True}
METHODS = {
    "backprop": Method(BACKPROP),
    "local": Method(LOCAL),
    "local, shared readout": Method(LOCAL, 0.0, SHARED),
    "local, one private block": Method(LOCAL, 0.0, {"blocks": 1}),
    "local, one tracked block": Method(LOCAL, 0.0, {"blocks": 1, "blocks_from": "next_tracked"}),
    "local, 1/8 of the tokens": Method(LOCAL, 0.0, EIGHTH),
    "local, rank 16": Method(LOCAL, 0.0, {"rank": 16}),
    "overlapping 2": Method({"mode": "overlapping", "window": 2}),
    "interlocking 2": Method({"mode": "interlocking", "window": 2}),
    "interlocking 3": Method({"mode": "interlocking", "window": 3}),
    "chunked 2": Method(CHUNKED),
    "chunked 2, backprop tail 20 %": Method(CHUNKED, 0.2),
    "chunked 2, backprop tail 40 %": Method(CHUNKED, 0.4),
    "chunked 2, one private block": Method(CHUNKED, 0.0, {"blocks": 1}),
    "chunked 2, half corrected": Method(mixed(1 / 2, CHUNKED, 1.0)),
    "chunked 2, last 40 % half corrected": Method(CHUNKED, 0.4, end=mixed(1 / 2, CHUNKED, 1.0)),
    "chunked 2, last 70 % half corrected": Method(CHUNKED, 0.7, end=mixed(1 / 2, CHUNKED, 1.0)),
    "shifted chunks 2": Method({"mode": "shifted_chunked", "window": 2}),
    "chunked 2, a quarter backprop": Method(mixed(1 / 4, CHUNKED)),
    "chunked 2, a quarter backprop, tail 20 %": Method(mixed(1 / 4, CHUNKED), 0.2),
    "chunked 2, a quarter backprop, tail 40 %": Method(mixed(1 / 4, CHUNKED), 0.4),
    "local, backprop tail 5 %": Method(LOCAL, 0.05),
    "local, backprop tail 10 %": Method(LOCAL, 0.1),
    "local, backprop tail 20 %": Method(LOCAL, 0.2),
    "local, backprop tail 40 %": Method(LOCAL, 0.4),
    "local, one backprop step in 8": Method(
        {"phases": [{**LOCAL, "until_step": 7}, BACKPROP], "cycle_steps": 8}
    ),
    "mixed 1/8": Method(mixed(1 / 8), 0.0, {}, 8),
    "mixed 1/4": Method(mixed(1 / 4)),
    "mixed 1/2": Method(mixed(1 / 2)),
    "mixed 1/8, tail 20 %": Method(mixed(1 / 8), 0.2, {}, 8),
    "mixed 1/4, tail 10 %": Method(mixed(1 / 4), 0.1),
    "mixed 1/4, tail 20 %": Method(mixed(1 / 4), 0.2),
    "mixed 1/4, last 40 % half corrected": Method(mixed(1 / 4), 0.4, end=mixed(1 / 2, LOCAL, 1.0)),
    "mixed 1/4, tail 40 %": Method(mixed(1 / 4), 0.4),
    "mixed 1/2, tail 10 %": Method(mixed(1 / 2), 0.1),
    "mixed 1/2, tail 20 %": Method(mixed(1 / 2), 0.2),
    "mixed 1/4, tail 20 %, 1/8 of the tokens": Method(mixed(1 / 4), 0.2, EIGHTH),
    "mixed 1/4, tail 20 %, 1/16 of the tokens": Method(
        mixed(1 / 4), 0.2, {"token_fraction": 0.0625}
    ),
    "mixed 1/4, tail 20 %, one private block": Method(mixed(1 / 4), 0.2, {"blocks": 1}),
    "mixed 1/4, tail 20 %, shared readout": Method(mixed(1 / 4), 0.2, SHARED),
    "mixed 1/4, tail 20 %, block, 1/8 of the tokens": Method(
        mixed(1 / 4), 0.2, {"blocks": 1, **EIGHTH}
    ),
}
YARDSTICKS = {COSINE: "backprop", WSD: "backprop, WSD"}  # what a row's gap is to
METHODS |= {
    "backprop, WSD": Method(BACKPROP, schedule=WSD),
    "chunked 2, WSD": Method(CHUNKED, schedule=WSD),
    "chunked 2, backprop tail 40 %, WSD": Method(CHUNKED, 0.4, schedule=WSD),
    "first chunk alone, rest fresh, backprop tail 40 %, WSD": Method(
        CHUNKED, 0.4, schedule=WSD, renew="fresh"
    ),
    "first chunk alone, rest copied, backprop tail 40 %, WSD": Method(
        CHUNKED, 0.4, schedule=WSD, renew="copied"
    ),
    "local, WSD": Method(LOCAL, schedule=WSD),
    "local, backprop tail 40 %, WSD": Method(LOCAL, 0.4, schedule=WSD),
    "chunked 2, shared readout": Method(CHUNKED, 0.0, SHARED),
    "chunked 2, shared readout, tail 40 %": Method(CHUNKED, 0.4, SHARED),
    "chunked 2, 1/4 of the tokens": Method(CHUNKED, 0.0, QUARTER),
    "chunked 2, rank 16": Method(CHUNKED, 0.0, {"rank": 16}),
}
AHEAD = {"mode": "backprop", "run_ahead": "auto"}
PREDICTED = AHEAD | {"predict_weights": True}
METHODS |= {
    "run ahead": Method(AHEAD),
    "run ahead, predicted": Method(PREDICTED),
    "run ahead, rates discounted": Method(AHEAD | {"delay_discount": 0.5}),
    "run ahead, backprop tail 20 %": Method(AHEAD, 0.2),
    "run ahead, predicted, backprop tail 20 %": Method(PREDICTED, 0.2),
    "run ahead, at most one": Method(AHEAD | {"run_ahead": 1}),
    "chunked 2, run ahead": Method(CHUNKED | {"run_ahead": "auto"}),
    "chunked 2, run ahead, predicted": Method(
        CHUNKED | {"run_ahead": "auto", "predict_weights": True}
    ),
}
for _count in (1, 2, 8, 16):  # micro-batches a step: the delay is a segment's lead divided by it
    METHODS |= {
        f"run ahead, {_count} micro-batches": Method(AHEAD, 0.0, {}, _count),
        f"run ahead, predicted, {_count} micro-batches": Method(PREDICTED, 0.0, {}, _count),
    }
TAILS = sorted({method.tail for method in METHODS.values() if method.tail})
NEAR = 1.5  # ratio of two runs' steps up to which a line between them is right to about 1 %
EVALUATED_TOKENS = 65536  # of the validation split
CHECKPOINTS = 20  # of a run, so that every tail begins at one


class Run(NamedTuple):
    """One training run of the study."""

    preset: str
    method: str
    segments: int
    seed: int
    lr_factor: float
    step_factor: float

    @property
    def name(self) -> str:
        plain = re.sub(r"[ ,%]+", "_", self.method.replace("/", "-")).strip("_")
        longer = "" if self.step_factor == 1 else f"-steps{self.step_factor:g}"
        return f"{plain}-K{self.segments}-seed{self.seed}-lr{self.lr_factor:g}{longer}"

    @property
    def steps(self) -> int:
        return round(PRESETS[self.preset].steps * self.step_factor)

    def switch(self, tail: float) -> int:
        """The step at which such a tail begins."""
        return switch_step(self.steps, tail)

    @property
    def trunk(self) -> Run | None:
        """The same run without a tail, if it is one of the study's."""
        method = METHODS[self.method]
        trunk = method._replace(tail=0.0, end=BACKPROP, renew="")
        plain = [name for name, other in METHODS.items() if method.tail and other == trunk]
        return self._replace(method=plain[0]) if plain else None


def switch_step(steps: int, tail: float) -> int:
    """The step at which a tail of so large a share begins."""
    return round(steps * (1 - tail))


def section_of(
    method: Method, num_segments: int, num_micro_batches: int, steps: int
) -> dict[str, Any]:
    """The "local_parallel" section of a method, for one process that holds all segments."""
    scheme, end = json.loads(json.dumps([method.scheme, method.end]))
    for entry in [*scheme.get("mix", ()), *end.get("mix", ())]:
        if "share" in entry:
            entry["micro_batches"] = max(1, round(entry.pop("share") * num_micro_batches))
    if method.tail:
        scheme = {"phases": [{**scheme, "until_step": switch_step(steps, method.tail)}, end]}
    return {
        **scheme,
        "num_stages": 1,
        "segments_per_stage": num_segments,
        "head": dict(method.head),
    }


def ds_config(run: Run) -> dict[str, Any]:
    preset, method = PRESETS[run.preset], METHODS[run.method]
    micro_batches = method.micro_batches or preset.micro_batches
    rate = preset.learning_rate * run.lr_factor
    warm_up = max(1, run.steps // 30)
    params: dict[str, Any] = {"total_num_steps": run.steps, "warmup_num_steps": warm_up}
    if method.schedule == WSD:
        params |= {  # the same warm-up at every length, so that runs have a beginning in common
            "warmup_num_steps": max(1, preset.steps // 60),
            "decay_num_steps": run.steps - run.switch(DECAY),
        }
        scheduler = {"type": "WarmupStableDecayLR", "params": params}
    else:
        scheduler = {"type": "WarmupCosineLR", "params": {**params, "cos_min_ratio": 0.1}}
    return {
        "train_micro_batch_size_per_gpu": preset.sequences // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 10,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": rate, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
        },
        "scheduler": scheduler,
        "local_parallel": {
            **section_of(method, run.segments, micro_batches, run.steps),
            "seed": run.seed,
        },
        **preset.precision,
    }


# --- running --------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.minutes * 60
    folder = ROOT / args.folder / args.preset
    folder.mkdir(parents=True, exist_ok=True)
    data = _prepared(args.preset)
    runs = [
        Run(args.preset, method, segments, seed, factor, steps)
        for seed in args.seeds
        for factor in args.lr_factors
        for steps in args.step_factors
        for segments in args.segments
        for method in args.methods
    ]
    for run in runs:
        place = folder / run.name
        place.mkdir(exist_ok=True)
        with _claimed(place / "lock") as mine:
            if (
                mine
                and not (place / "result.json").exists()
                and not _train(run, place, data, deadline)
            ):
                return 0 if time.monotonic() >= deadline else 1
    print("all of these runs are finished")
    return 0


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Is this run ours, and not another process's?"""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _prepared(preset: str) -> Path:
    facts = PRESETS[preset]
    kind = "packages" if facts.source == PACKAGES else "study"
    data = (
        ROOT / "data" / f"{kind}-{facts.tokenizer.partition(':')[2]}-{facts.model['n_positions']}"
    )
    data.parent.mkdir(exist_ok=True)
    with (data.parent / f"{data.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (data / "prepared.json").exists():
            source = str(package_text(ROOT / "data")) if facts.source == PACKAGES else facts.source
            command = [
                "--source",
                source,
                "--tokenizer",
                facts.tokenizer,
                "--seq-len",
                str(facts.model["n_positions"]),
            ]
            subprocess.run(
                [
                    sys.executable,
                    ROOT / "scripts" / "prepare_data.py",
                    *command,
                    "--output",
                    str(data),
                ],
                check=True,
            )
    return data


def package_text(folder: Path) -> Path:
    """Write the Python files of TEXT_OF, one JSON line each and none twice, in an order that depends on their names alone.

    Beside it lies packages.json: versions, the number of files and bytes, a checksum, and every file with its own.
    """
    files: dict[str, bytes] = {}
    versions = {}
    for package in TEXT_OF:
        distribution = metadata.distribution(package)
        versions[package] = distribution.version
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if file.suffix == ".py" and not {"test", "tests"} & set(file.parts) and path.is_file():
                files[file.as_posix()] = path.read_bytes()
    sums = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files, key=_shuffled)}
    first = {checksum: name for name, checksum in reversed(sums.items())}
    kept = {name: checksum for name, checksum in sums.items() if first[checksum] == name}
    text = folder / "packages.jsonl"
    with text.open("w") as output:
        for name in kept:
            output.write(json.dumps({"text": files[name].decode("utf-8", errors="ignore")}) + "\n")
    facts = {
        "packages": versions,
        "files": len(kept),
        "bytes": sum(len(files[name]) for name in kept),
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "file_sha256": kept,
    }
    (folder / "packages.json").write_text(json.dumps(facts, indent=1) + "\n")
    return text


def _shuffled(name: str) -> str:
    """Sorts files of all packages among each other: the first validation sequences must not be of one package."""
    return hashlib.sha256(name.encode()).hexdigest()


def _train(run: Run, place: Path, data: Path, deadline: float) -> bool:
    """Train until done or out of time. True when done."""
    preset = PRESETS[run.preset]
    (place / "model.json").write_text(json.dumps(preset.model))
    (place / "ds_config.json").write_text(json.dumps(ds_config(run), indent=1))
    if not (place / "run").exists():
        _leave_trunk(run, place)
        if METHODS[run.method].renew and not (place / "run").exists():
            print(f"{run.name}: run the same without its tail first", file=sys.stderr)
            return False
    environment = {
        "OMP_NUM_THREADS": "1",  # threads of two runs on the same cores cost ten times what they bring
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # a free one; nobody else comes
    }
    command = [
        sys.executable, str(ROOT / "scripts" / "train.py"), "--model", str(place / "model.json"), "--data", str(data),
        "--output", str(place / "run"), "--max-steps", str(run.steps), "--eval-every", str(max(1, run.steps // 10)),
        "--save-every", str(max(1, run.steps // CHECKPOINTS)),
        "--eval-sequences", str(EVALUATED_TOKENS // preset.model["n_positions"]),
        "--deepspeed_config", str(place / "ds_config.json"), "--resume", "--allow-change", "scheme",
    ]  # fmt: skip
    with (place / "log.txt").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
        try:
            code = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves and leaves
            process.wait(120)
            print(f"{run.name}: to be continued")
            return False
    if code:
        print(f"{run.name}: failed, see {place / 'log.txt'}", file=sys.stderr)
        return False
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    if rows[-1]["step"] < run.steps:  # somebody else asked it to stop
        print(f"{run.name}: to be continued")
        return False
    last = [
        row for row in rows if row["split"] == "validation" and row["segment"] == run.segments - 1
    ]
    since = (
        run.switch(METHODS[run.method].tail) if METHODS[run.method].renew else 0
    )  # before it was another model
    curve = [(row["tokens"], row["loss"]) for row in last if row["step"] > since]
    exits = {
        r["segment"]: r["loss"]
        for r in rows
        if r["split"] == "validation" and r["step"] == run.steps
    }
    facts = json.loads((place / "run" / "run.json").read_text())
    seconds = [row["seconds"] for row in rows if row["split"] == "train"]
    result = {
        **run._asdict(), "loss": curve[-1][1], "curve": curve, "exits": exits, "tokens": rows[-1]["tokens"],
        "parts": facts["layout"]["segment_parts"], "versions": facts["versions"], "machine": facts["machine"],
        "data": facts["data"]["fingerprint"], "seconds": seconds[-1] if seconds else None,
    }  # fmt: skip
    (place / "result.json").write_text(strict_json.dumps(result, indent=1))
    needed = {run.steps} | (
        {run.switch(tail) for tail in TAILS} if not METHODS[run.method].tail else set()
    )
    if METHODS[run.method].schedule == WSD:
        needed.add(run.switch(DECAY))
    for checkpoint in (place / "run" / "checkpoints").glob("global_step*"):
        if int(checkpoint.name.removeprefix("global_step")) not in needed:
            shutil.rmtree(checkpoint)
    print(f"{run.name}: {result['loss']:.4f}")
    return True


def _leave_trunk(run: Run, place: Path) -> None:
    """Begin from the checkpoint of a run that is the same until then, where there is one."""
    found = _shared(run, place.parent)
    if found is None:
        return
    trunk, tag = found
    partial = place / "run.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for part in (tag, "tokenizer"):
        shutil.copytree(trunk / "checkpoints" / part, partial / "checkpoints" / part)
    for part in ("run.json", "metrics.jsonl"):
        shutil.copy(trunk / part, partial / part)
    (partial / "checkpoints" / "latest").write_text(tag)
    if METHODS[run.method].renew:
        renew_above(partial / "checkpoints" / tag, 1, METHODS[run.method].renew, run.seed)
    partial.rename(place / "run")


def _shared(run: Run, folder: Path) -> tuple[Path, str] | None:
    """(run folder, tag) of the checkpoint to begin with.

    Under a cosine that is the finished run without a tail, where the tail begins. WSD runs of any
    length are the same until one of them decays, finished or not.
    """
    method, trunk = METHODS[run.method], run.trunk or run
    if method.schedule == COSINE:
        place, tag = folder / trunk.name, f"global_step{run.switch(method.tail)}"
        there = method.tail and (place / "run" / "checkpoints" / tag).exists()
        return (place / "run", tag) if there and (place / "result.json").exists() else None
    differs, base = run.switch(method.tail or DECAY), trunk._replace(step_factor=1.0).name
    found = [(-1, folder)]
    for place in folder.glob(f"{base}*"):
        other_length = place.name == base or place.name.startswith(f"{base}-steps")
        if other_length and (place / "run").exists():
            config = json.loads((place / "ds_config.json").read_text())
            steps = config["scheduler"]["params"]["total_num_steps"]
            last = min(differs, switch_step(steps, DECAY))
            for facts in (place / "run" / "checkpoints").glob("global_step*/ds_local.json"):
                step = int(facts.parent.name.removeprefix("global_step"))
                found += [(step, place / "run")] if step <= last else []
    step, best = max(found)
    if step < 0 or (method.renew and step < differs):
        return None
    return best, f"global_step{step}"


def renew_above(checkpoint: Path, segment: int, how: str, seed: int) -> None:
    """Make a checkpoint one in which only the segments up to `segment` have learnt anything.

    Their head becomes the model's readout. The blocks above are "fresh", drawn as GPT-2's are, or "copied" from those below,
    the first on the first. What is replaced has no moments.
    """
    import torch

    facts = json.loads((checkpoint / "ds_local.json").read_text())
    top, boundary = facts["segment_parts"][-1] - 1, facts["segment_parts"][segment + 1]
    layers = [f"layer_{layer:02d}-model_states.pt" for layer in range(top + 1)]
    draw, config = torch.Generator().manual_seed(seed), facts["model"]

    def fresh(name: str, old: Any) -> Any:
        if old.ndim == 1:
            return torch.full_like(old, float(name.endswith("weight")))  # norms and biases
        std = config["initializer_range"] / (
            math.sqrt(2 * config["n_layer"]) if "c_proj" in name else 1
        )
        return torch.empty_like(old).normal_(0.0, std, generator=draw)

    states = {
        name: torch.load(checkpoint / name, map_location="cpu", weights_only=False)
        for name in layers
    }
    counts = [len(states[name]) for name in layers]
    for layer in range(boundary, top):
        below = states[layers[1 + (layer - boundary) % (boundary - 1)]]
        for name, old in states[layers[layer]].items():
            old.copy_(fresh(name, old) if how == "fresh" else below[name])
    head = torch.load(
        checkpoint / f"head_{segment:02d}-model_states.pt", map_location="cpu", weights_only=False
    )
    for name, old in states[layers[top]].items():
        old.copy_(head[name])
    for name in layers[boundary:]:
        torch.save(states[name], checkpoint / name)
    stage = "mp_rank_00_model_states.pt"
    whole = torch.load(checkpoint / stage, map_location="cpu", weights_only=False)
    for parameter in range(sum(counts[:boundary]), sum(counts)):
        for moment in ("exp_avg", "exp_avg_sq"):
            whole["optimizer"]["state"][parameter][moment].zero_()
    torch.save(whole, checkpoint / stage)
    for name in [*layers[boundary:], stage]:
        content = (checkpoint / name).read_bytes()
        facts["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (checkpoint / "ds_local.json").write_text(json.dumps(facts, indent=1) + "\n")


# --- the table ------------------------------------------------------------------------------------------------------------


START, END = "<!-- written by scripts/study.py table, from here -->", "<!-- to here -->"


class Prediction(NamedTuple):
    aux_share: float  # of the FLOPs of the busiest stage
    time: dict[
        tuple[int, int], float
    ]  # (micro-batches, c/F) -> time of the run against balanced 1F1B
    split: dict[tuple[int, int], float]  # the same with a split backward


def predict(model: dict[str, Any], method: Method, num_segments: int, seq_len: int) -> Prediction:
    """One segment on each of as many stages, each method with boundaries of its own."""
    from ds_local.model.blocks import load_model_config

    config = load_model_config(dict(model))
    prediction = Prediction(0.0, {}, {})
    for count in (4, 8, 16):
        yardstick, _ = _forecast(config, METHODS["backprop"], num_segments, count, seq_len, 0)
        for ratios, split_backward in ((prediction.time, 0), (prediction.split, 2)):
            times, shares = _forecast(config, method, num_segments, count, seq_len, split_backward)
            ratios |= {
                (count, slow_link): times[slow_link] / yardstick[slow_link] for slow_link in times
            }
        if count == 8:
            prediction = prediction._replace(aux_share=max(shares))
    return prediction


def _forecast(
    config: Any, method: Method, num_segments: int, count: int, seq_len: int, split_backward: int
) -> tuple[dict[int, float], list[float]]:
    """(c/F -> time of 1,000 steps of `count` micro-batches, auxiliary share of each stage in the
    first step)."""
    from ds_local.config.files import local_parallel
    from ds_local.model.flops import auxiliary_shares, choose_parts, segment_times, unit_flops
    from ds_local.schedules.run_plan import RunPlan
    from ds_local.schedules.simulator import Costs, simulate

    steps = 1000
    layout = {"num_stages": num_segments, "split_backward": split_backward}
    sections = [
        local_parallel(
            {
                "local_parallel": {
                    **section_of(method, 1, count, steps),
                    **layout,
                    "link": {"transfer": transfer},
                }
            }
        )
        for transfer in (0.0, 1.0)
    ]
    section = sections[0]
    plans = [RunPlan(section, num_segments, count) for section in sections]
    parts = choose_parts(config, section, num_segments, count, seq_len)
    unit = unit_flops(config, section.head, num_segments, seq_len)
    forward, input_grad, weight_grad, head = segment_times(unit, parts)
    transfer = (
        unit.block / 3 * (parts[-1] - 2) / num_segments
    )  # as long as the forward of a mean stage
    stretches = [(start, scheme.period) for start, scheme in section.schemes()]
    if section.cycle_steps:
        stretches = [(0, section.cycle_steps)]
    ends = [start for start, _ in stretches[1:]] + [steps]
    times = dict.fromkeys((0, 1), 0.0)
    for slow_link in times:
        costs = Costs(forward, input_grad, weight_grad, head, slow_link * transfer)
        for (start, period), end in zip(stretches, ends, strict=True):
            schedules = [plans[slow_link].schedule_at(start + i) for i in range(period)]
            times[slow_link] += (end - start) * simulate(schedules, costs).steady_period
    return times, auxiliary_shares(config, section, plans[0].schedule_at(0), parts, seq_len)


def all_runs(kept: Path, folder: Path) -> list[dict[str, Any]]:
    """The results kept in a file of one line each, and those finished in a folder, which are added
    to it but for trials."""
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    results += [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/result.json"))]
    latest = {
        tuple(result[field] for field in Run._fields): result
        for result in results
        if result["preset"] != TRIAL
    }
    runs = [latest[identity] for identity in sorted(latest)]
    kept.write_text("".join(strict_json.dumps(run) + "\n" for run in runs))
    return runs


def best_rate(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at the learning rate with the lowest mean loss over the seeds that were tried at
    every rate."""
    rates = sorted({r["lr_factor"] for r in results})
    common = set.intersection(
        *({r["seed"] for r in results if r["lr_factor"] == rate} for rate in rates)
    )
    runs_at = [[r for r in results if r["lr_factor"] == rate] for rate in rates]
    return min(
        runs_at, key=lambda runs: mean(r["loss"] for r in runs if r["seed"] in common or not common)
    )


def runs_of(
    results: list[dict[str, Any]], method: str, segments: int, step_factor: float
) -> list[dict[str, Any]]:
    """The runs of a row, at its best rate. One of backprop serves for every number of segments."""
    return best_rate(
        [
            r
            for r in results
            if (r["method"], r["step_factor"]) == (method, step_factor)
            and (r["segments"] == segments or method in YARDSTICKS.values())
        ]
    )


def gap_to(yardsticks: Mapping[int, float | None], runs: list[dict[str, Any]]) -> float | None:
    """Mean difference in loss to a yardstick (seed -> loss), over the seeds that both have; None if
    there is none."""
    gaps = [run["loss"] - loss for run in runs if (loss := yardsticks.get(run["seed"])) is not None]
    return mean(gaps) if gaps else None


def depth_pays(
    results: list[dict[str, Any]], yardsticks: Mapping[int, Mapping[float, float]], longer: float
) -> bool | None:
    """Does backprop end below every lower exit of the runs of this length? None if none is known.

    Where it does not, a shorter model would have done as well, and gaps say nothing about depth.
    """
    pairs = [
        (loss, yardsticks[run["seed"]][longer])
        for run in results
        if run["step_factor"] == longer and not METHODS[run["method"]].tail
        for segment, loss in run.get("exits", {}).items()
        if int(segment) < run["segments"] - 1 and longer in yardsticks.get(run["seed"], {})
    ]
    return all(exit_loss > whole for exit_loss, whole in pairs) if pairs else None


def tokens_to(loss: float, runs: list[dict[str, Any]]) -> float | None:
    """Share of a run's tokens after which its mean validation curve is down at a loss; None if it
    never is."""
    longest = max(len(run["curve"]) for run in runs)  # of a few runs only the end was kept
    curves = [run["curve"] for run in runs if len(run["curve"]) == longest]
    points = [
        (tokens[0][0], mean(value for _, value in tokens)) for tokens in zip(*curves, strict=True)
    ]
    for (before, high), (after, low) in pairwise(points):
        if low <= loss < high:
            return (before + (after - before) * (high - loss) / (high - low)) / points[-1][0]
    return None


def time_for_the_loss(loss: float, yardsticks: Mapping[float, float]) -> float | None:
    """How many times the preset's steps backprop needs to end with this loss, from its whole runs
    (step factor -> loss).

    Between two of them, if they are near enough, the loss is a line over the logarithm of the
    steps. A whole run has cooled its learning rate down, as the run it is compared with has: a
    point of a longer run's curve has not.
    """
    for (shorter, high), (longer, low) in pairwise(sorted(yardsticks.items())):
        if low <= loss <= high and longer <= NEAR * shorter:
            return shorter * (longer / shorter) ** ((high - loss) / (high - low))
    return None


def percent(gap: float | None) -> float | None:
    """A difference in loss as one in perplexity, in %."""
    return None if gap is None else round(100 * math.expm1(gap), 2)


def ratios_of(times: Mapping[tuple[int, int], float], steps: float = 1.0) -> dict[str, float]:
    """Time of so many times a run's steps, against that of the balanced 1F1B run."""
    return {f"M={m}, c/F={c}": round(steps * t, 4) for (m, c), t in times.items()}


def table(args: argparse.Namespace) -> int:
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    results = all_runs(docs / "quality-runs.jsonl", ROOT / args.folder)
    rows_of = {name: summary(name, [r for r in results if r["preset"] == name]) for name in PRESETS}
    rows_of = {name: rows for name, rows in rows_of.items() if rows}
    if not rows_of:
        print("no backprop run is finished yet; run it first", file=sys.stderr)
        return 1
    (docs / "quality.json").write_text(
        strict_json.dumps([row for rows in rows_of.values() for row in rows], indent=1) + "\n"
    )
    at_ratio = {name: rows for name, rows in rows_of.items() if "ratio" in name}
    others = {name: rows for name, rows in rows_of.items() if name not in at_ratio}
    for page, written, lines in (
        ("quality.md", others, markdown),
        ("quality-ratio.md", at_ratio, ratio_markdown),
    ):
        if written:
            _write_between(docs / page, lines(written))
            print(lines(written))
    if others:
        draw(results, others, docs / "quality.png")
    return 0


def _write_between(page: Path, text: str) -> None:
    """Replace what is between the two marks of a page."""
    whole = page.read_text() if page.exists() else f"# Quality at equal tokens\n\n{START}\n{END}\n"
    before, _, rest = whole.partition(START)
    page.write_text(f"{before}{START}\n{text}{END}{rest.partition(END)[2]}")


def summary(preset: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method, number of segments and number of steps; none without a backprop run
    under the same schedule to compare with."""
    return [row for schedule in YARDSTICKS for row in _rows_under(schedule, preset, results)]


def _rows_under(schedule: str, preset: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from ds_local.model.blocks import load_model_config, skeleton

    facts, yardstick = PRESETS[preset], YARDSTICKS[schedule]
    results = [
        r for r in results if r["method"] in METHODS and METHODS[r["method"]].schedule == schedule
    ]
    backprop = [r for r in results if r["method"] == yardstick]
    yardsticks: dict[int, dict[float, float]] = {}  # seed -> step factor -> loss
    whole_lengths = {r["step_factor"] for r in backprop}
    for steps in whole_lengths:
        for run in best_rate([r for r in backprop if r["step_factor"] == steps]):
            yardsticks.setdefault(run["seed"], {})[steps] = run["loss"]
    parameters = sum(p.numel() for p in skeleton(load_model_config(dict(facts.model))).parameters())
    rows = []
    for method, segments, longer in sorted(
        {(r["method"], r["segments"], r["step_factor"]) for r in results}
        | {
            (yardstick, r["segments"], r["step_factor"])
            for r in results
            if r["step_factor"] in whole_lengths
        },
        key=lambda kind: (list(METHODS).index(kind[0]), *kind[1:]),
    ):
        runs = runs_of(results, method, segments, longer)
        loss = mean(r["loss"] for r in runs)
        gap = gap_to({seed: whole.get(longer) for seed, whole in yardsticks.items()}, runs)
        if gap is None:
            print(
                f"{method} is left out: {yardstick} has no run of as many steps with a seed that it has",
                file=sys.stderr,
            )
            continue
        if METHODS[method].renew:  # no pipeline in its first part: no time to predict
            forecast = Prediction(0.0, {}, {})
        else:
            forecast = predict(facts.model, METHODS[method], segments, facts.model["n_positions"])
        needed = tokens_to(loss - gap, runs)
        times = [
            t
            for run in runs
            if (t := time_for_the_loss(run["loss"], yardsticks.get(run["seed"], {}))) is not None
        ]
        rows.append(
            {
                "preset": preset,
                "method": method,
                "segments": segments,
                "parameters": parameters,
                "tokens": runs[0]["tokens"],
                "step_factor": longer,
                "seeds": len(runs),
                "perplexity": round(math.exp(loss), 4),
                "gap_percent": percent(gap),
                "gap_nats": round(gap, 4),
                "schedule": schedule,
                "depth_pays": depth_pays(results, yardsticks, longer),
                "exits": {} if METHODS[method].tail else runs[0].get("exits", {}),
                "aux_flops_share": round(forecast.aux_share, 4),
                "predicted_time_ratio": ratios_of(forecast.time).get("M=8, c/F=0"),
                "device": runs[0]["machine"]["device"],
                "processor": runs[0]["machine"]["processor"],
                "predicted_time_to_backprop_loss": None
                if needed is None
                else ratios_of(forecast.time, needed),
                "learning_rate": facts.learning_rate * runs[0]["lr_factor"],
                "losses": [round(r["loss"], 4) for r in runs],
                "predicted_time_ratios": ratios_of(forecast.time),
                "predicted_time_ratios_split": ratios_of(forecast.split),
                "time_to_equal_loss": ratios_of(forecast.time, longer / mean(times))
                if times
                else None,
                "time_to_equal_loss_split": ratios_of(forecast.split, longer / mean(times))
                if times
                else None,
            }
        )
    return rows


PREAMBLE = (
    "Each table from `python scripts/study.py run --preset PRESET ...`, all of them then by `python scripts/study.py table`. The "
    "gap is in perplexity, to the backprop runs of the same steps and seeds; each method has the best of the learning rates "
    "tried. The auxiliary share is of the busiest stage's FLOPs; times are simulated, one segment a stage, for the whole run, "
    "against balanced 1F1B with equal steps, for M micro-batches a step; on slow links a message takes as long as a forward, for "
    '1F1B too. Split is the same with `"split_backward": 2`. The time to equal loss is the method\'s time by that which 1F1B '
    "needs for a backprop run that ends with the method's loss, of those seeds that have whole backprop runs of other lengths. "
    "The last column is the time, at M = 4 and 8, until the loss is down at the last of the backprop runs of equal steps. Where "
    "it is cut changes nothing of a backprop run, so one serves for every K."
)


def markdown(rows_of: Mapping[str, list[dict[str, Any]]]) -> str:
    """A table for each preset."""
    lines = _wrapped(PREAMBLE)
    for preset, rows in rows_of.items():
        facts = PRESETS[preset]
        batch = facts.sequences * facts.model["n_positions"]
        lines += [
            "",
            f"### Preset {preset}: steps of {batch:,} tokens",
            "",
            *_wrapped(
                f"{facts.model['n_layer']} blocks of width {facts.model['n_embd']}, {rows[0]['parameters']:,} parameters, "
                f"{rows[0]['processor']} {rows[0]['device']}."
            ),
            "",
            "| method | K | steps | rate | seeds | loss (lowest-highest) | perplexity | gap | auxiliary share "
            "| time, M = 4 / 8 / 16, slow 4 / 8 | split | time to equal loss, M = 4 / 8, slow 4 / 8 | split "
            "| to backprop's last loss |",
            "|" + 14 * "---|",
            *(_line(row, round(facts.steps * row["step_factor"])) for row in rows),
        ]
    return "\n".join(lines) + "\n"


def ratio_markdown(rows_of: Mapping[str, list[dict[str, Any]]]) -> str:
    """Losses and gaps alone, a table for each preset."""
    lines: list[str] = []
    for preset, rows in rows_of.items():
        facts = PRESETS[preset]
        width, vocabulary = facts.model["n_embd"], facts.model["vocab_size"]
        batch = facts.sequences * facts.model["n_positions"]
        lines += [
            *([""] if lines else []),
            f"### Preset {preset}: vocabulary / width {vocabulary // width}",
            "",
            *_wrapped(
                f"{facts.model['n_layer']} blocks of width {width}, vocabulary {vocabulary:,}, "
                f"{rows[0]['parameters']:,} parameters; steps of {batch:,} tokens, "
                f"rate {facts.learning_rate:g}; {rows[0]['processor']} {rows[0]['device']}."
            ),
            "",
            "| method | steps | seeds | loss of the model | loss of its lowest exit | gap in nats "
            "| gap in perplexity |",
            "|" + 7 * "---|",
            *(_ratio_line(row, round(facts.steps * row["step_factor"])) for row in rows),
        ]
        for length in sorted({r["step_factor"] for r in rows if r["depth_pays"] is False}):
            lines += [
                "",
                *_wrapped(
                    f"**With {round(facts.steps * length):,} steps depth does not pay yet**: "
                    "a lower exit ends below backpropagation, so these gaps are no ranking."
                ),
            ]
    return "\n".join(lines) + "\n"


def _ratio_line(row: dict[str, Any], steps: int) -> str:
    lowest = row["exits"].get(min(row["exits"], key=int, default=""))
    has_exit = len(row["exits"]) > 1
    cells = [
        f"{row['method']}, K = {row['segments']}",
        f"{steps:,}",
        row["seeds"],
        f"{mean(row['losses']):.4f}",
        f"{lowest:.4f}" if has_exit else "-",
        f"{row['gap_nats']:+.4f}",
        f"{row['gap_percent']:+.1f} %",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=128, break_on_hyphens=False)


def _line(row: dict[str, Any], steps: int) -> str:
    losses = row["losses"]

    def times(field: str, *counts: int, slow: tuple[int, ...] = (4, 8)) -> str:
        of = row[field]
        if not of:
            return "-"
        groups = [
            [f"{of[f'M={m}, c/F={c}']:.2f}" for m in group]
            for c, group in enumerate((counts, slow))
            if group
        ]
        return ", ".join(" / ".join(group) for group in groups)

    spread = f" ({min(losses):.4f}-{max(losses):.4f})" if len(losses) > 1 else ""
    cells = [
        row["method"],
        row["segments"],
        f"{steps:,}",
        f"{row['learning_rate']:g}",
        row["seeds"],
        f"{mean(losses):.4f}{spread}",
        f"{row['perplexity']:.3f}",
        f"{row['gap_percent']:+.1f} %",
        f"{row['aux_flops_share']:.1%}",
        *(times(f"predicted_time_ratios{split}", 4, 8, 16) for split in ("", "_split")),
        *(times(f"time_to_equal_loss{split}", 4, 8) for split in ("", "_split")),
        times("predicted_time_to_backprop_loss", 4, 8, slow=()),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


SHOWN = (
    "backprop",
    "local",
    "mixed 1/4",
    "mixed 1/4, tail 20 %",
    "chunked 2",
    "chunked 2, backprop tail 40 %",
    "interlocking 2",
    "chunked 2, last 40 % half corrected",
)


def draw(
    results: list[dict[str, Any]], rows_of: Mapping[str, list[dict[str, Any]]], picture: Path
) -> None:
    """Validation loss against tokens, and against predicted time: a line of panels for each preset,
    its most compared length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(rows_of),
        2,
        figsize=(11, 4.2 * len(rows_of)),
        layout="constrained",
        sharey="row",
        squeeze=False,
    )
    for axes, (preset, rows) in zip(panels, rows_of.items(), strict=True):
        shown = [row for row in rows if row["segments"] == 4 and row["method"] in SHOWN]
        lengths = [row["step_factor"] for row in shown]
        length = max(lengths, key=lambda factor: (lengths.count(factor), factor))
        for row in (row for row in shown if row["step_factor"] == length):
            runs = runs_of([r for r in results if r["preset"] == preset], row["method"], 4, length)
            run = max(runs, key=lambda r: len(r["curve"]))  # of a few runs only the end was kept
            tokens, losses = zip(*run["curve"], strict=True)
            for axis, scale in zip(
                axes, (1.0, row["predicted_time_ratios_split"]["M=4, c/F=0"]), strict=True
            ):
                axis.plot(
                    [t * scale / 1e6 for t in tokens],
                    losses,
                    marker=".",
                    color=f"C{SHOWN.index(row['method'])}",
                    label=row["method"],
                )
        facts = PRESETS[preset]
        axes[0].set_ylabel(
            f"validation loss (nats), {facts.sequences * facts.model['n_positions']:,} tokens a step"
        )
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.set_ylim(top=min(axis.get_ylim()[1], 3.0))
        axes[0].legend(fontsize=8)
    panels[-1][0].set_xlabel("million tokens")
    panels[-1][1].set_xlabel("time for P = M = 4, split backward (1F1B: 1 per million tokens)")
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table", "methods"])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--segments", nargs="+", type=int, default=[4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--lr-factors",
        nargs="+",
        type=float,
        default=[1.0],
        help="factors on the preset's learning rate",
    )
    parser.add_argument(
        "--step-factors",
        nargs="+",
        type=float,
        default=[1.0],
        help="factors on the preset's number of steps",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="stop after so long; what is unfinished goes on next time",
    )
    parser.add_argument("--folder", default="out/study", help="where runs are kept")
    args = parser.parse_args()
    if args.command == "methods":
        print("\n".join(METHODS))
        return 0
    return work(args) if args.command == "run" else table(args)


if __name__ == "__main__":
    sys.exit(main())
