"""Start scripts as a user does, with a tiny model and tiny data."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fork_client import Run, Server, environment, free_port
from reference import GPT2

from ds_local.checkpoints.run_fields import METRICS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def write_inputs(folder: Path, **config) -> dict[str, str]:
    """Model config, DeepSpeed config and data in `folder`; the arguments that name them."""
    import numpy as np

    from ds_local.data.corpus import prepare

    rng = np.random.default_rng(0)
    lines = [" ".join("".join(rng.choice(list("abcde"), 3)) for _ in range(40)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    facts = prepare(
        [str(folder / "text.txt")], "sentencepiece:320", 16, folder / "data", progress=False
    )
    (folder / "model.json").write_text(json.dumps({**GPT2, "vocab_size": facts["vocab_size"]}))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "steps_per_print": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 20, "warmup_num_steps": 2},
        },
        "local_parallel": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
        **config,
    }
    (folder / "ds_config.json").write_text(json.dumps(settings))
    return {
        "--model": str(folder / "model.json"),
        "--data": str(folder / "data"),
        "--deepspeed_config": str(folder / "ds_config.json"),
    }


def command(
    arguments: dict[str, str], *more: str, ranks: int = 2, launcher: str = "deepspeed"
) -> list[str]:
    start = {
        "deepspeed": [
            str(BIN / "deepspeed"),
            "--num_gpus",
            str(ranks),
            "--master_port",
            str(free_port()),
        ],
        "torchrun": [
            str(BIN / "torchrun"),
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            str(free_port()),
        ],
        # "--cpu" would start one process only; "--multi_gpu" starts them through torchrun and asks
        # for no GPU
        "accelerate": [
            str(BIN / "accelerate"),
            "launch",
            "--multi_gpu",
            "--num_processes",
            str(ranks),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(free_port()),
        ],
    }[launcher]
    flat = [part for pair in arguments.items() for part in pair]
    return [*start, str(ROOT / "scripts" / "train.py"), *flat, "--deepspeed", *more]


def launch(
    arguments: dict[str, str],
    *more: str,
    timeout: float = 180,
    ranks: int = 2,
    launcher: str | None = None,
) -> subprocess.CompletedProcess:
    """Run scripts/train.py under a real launcher, or without one on ranks of the fork server,
    which to the script is the same and takes a tenth of the time."""
    if launcher is None:
        flat = [part for pair in arguments.items() for part in pair]
        return finished(start("train.py", *flat, "--deepspeed", *more, ranks=ranks), timeout)
    return subprocess.run(
        command(arguments, *more, ranks=ranks, launcher=launcher),
        check=False,
        env=environment(),
        cwd=ROOT,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def script(name: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run scripts/`name` as `python` does, in a process of the fork server."""
    return finished(start(name, *arguments), timeout)


_servers: list[tuple[Server, tempfile.TemporaryDirectory]] = []


def fork_server() -> Server:
    """The fork server of this test session, started at the first call."""
    if not _servers:
        folder = tempfile.TemporaryDirectory(prefix="ds_local-processes-")
        _servers.append((Server(Path(folder.name), unloads=False), folder))
    return _servers[0][0]


def close_fork_server() -> None:
    while _servers:
        server, folder = _servers.pop()
        with server:
            pass
        folder.cleanup()


def start(
    name: str, *arguments: str, ranks: int = 1, cwd: Path = ROOT, unloads: bool = False
) -> Run:
    """Processes that run scripts/`name`, or a script with an absolute path. With `unloads` they
    take apart what was imported, as those of real launchers do in any case."""
    return fork_server().start(name, arguments, ranks, cwd=cwd, unloads=unloads)


def finished(run: Run, timeout: float) -> subprocess.CompletedProcess:
    """Wait as a launcher does: the first rank that fails ends the others."""
    in_time = run.wait_as_launchers_do(timeout)
    statuses, output = run.statuses(), run.outputs()
    left = run.close()
    if not in_time or left:
        raise subprocess.TimeoutExpired(str(run.folder), timeout, output)
    return subprocess.CompletedProcess(run.pids, next(filter(None, statuses), 0), output)


def metrics(run: Path) -> list[dict]:
    """Rows of metrics.jsonl; the reference knows all that is in them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not set().union(*map(unknown_fields, rows))
    return rows


def unknown_fields(row: dict) -> set[str]:
    """What the reference does not know in a row of this kind."""
    return {name for name in row if name not in METRICS or row["split"] not in METRICS[name].splits}


def losses(run: Path) -> dict[tuple, float]:
    return {(row["split"], row["step"], row["segment"]): row["loss"] for row in metrics(run)}
