"""Ways of keeping data-parallel replicas one model: what they cost per replica, and what they learn
from the same tokens.

python scripts/study_replicas.py costs --json costs.json
python scripts/study_replicas.py quality --data DIR --replicas 2 --steps 300 --json quality.json
python scripts/study_replicas.py table quality.json more.json

Real gloo processes on this machine. Times are processor seconds of a replica, so that neighbours on
the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

from ds_local.cli.arguments import output_file
from ds_local.config import strict_json
from ds_local.config.catalog import SCHEMES
from ds_local.config.deepspeed import adamw, cosine
from ds_local.measure.ranks import Pool
from ds_local.outputs import write_file
from ds_local.study.recipes import gpt2

PACE_STEPS = 60  # to see how long a step takes
SUBNETS = {"sync": "subnets"}
PERIODIC = {"sync": "periodic", "every": 50}
SYNCS: dict[str, dict[str, Any]] = {
    "gradients": {},
    "subnets J=5": {**SUBNETS, "every": 5},
    "subnets J=15": {**SUBNETS, "every": 15},
    "subnets J=50": {**SUBNETS, "every": 50},
    "subnets J=15, scale none": {**SUBNETS, "every": 15, "scale": "none"},
    "subnets J=15, scale train": {**SUBNETS, "every": 15, "scale": "train"},
    "subnets J=15, scale sqrt": {**SUBNETS, "every": 15, "scale": "sqrt"},
    "subnets J=15, moments reset": {**SUBNETS, "every": 15, "optimizer_state": "reset"},
    "subnets J=15, second moments kept": {
        **SUBNETS,
        "every": 15,
        "optimizer_state": "keep_second_moment",
    },
    "subnets J=15, MLP alone": {**SUBNETS, "every": 15, "partition": ["mlp"]},
    "periodic J=50": PERIODIC,
    "plain average J=50": {**PERIODIC, "outer_lr": 1.0, "outer_momentum": 0.0},
}
ROWS: dict[str, dict[str, Any]] = {
    "backprop": SCHEMES["backprop"].section,
    "local": SCHEMES["local"].section | {"segments_per_stage": 2},
}


def model_config(width: int, depth: int, vocabulary: int, seq_len: int) -> dict[str, Any]:
    return {
        **gpt2(depth, width, 8, vocabulary, seq_len),
        "activation_function": "gelu_new",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def build(
    model: dict[str, Any],
    row: dict[str, Any],
    replicas: dict[str, Any],
    batch: int,
    steps: int,
    lr: float,
    seed: int = 1,
) -> Any:
    import ds_local

    config = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": adamw(lr),
        "scheduler": cosine(steps, max(2, steps // 10)),
        "local_parallel": {**row, "replicas": replicas, "seed": seed},
    }
    return ds_local.initialize(
        model=ds_local.causal_lm(model, num_stages=1, config=config), config=config
    )[0]


# --- costs ----------------------------------------------------------------------------------------


def costs_of(
    model: dict[str, Any], replicas: dict[str, Any], batch: int, steps: int
) -> dict[str, Any]:
    """What this replica holds, computes and sends."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ds_local.model.blocks import Block

    engine = build(model, ROWS["backprop"], replicas, batch, steps, 1e-3)
    blocks = [layer for layer in engine.module.layers_of(0) if isinstance(layer, Block)]
    hidden = torch.randn(batch, model["n_positions"], model["n_embd"], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = hidden
        for block in blocks:
            out = block(out)
        out.sum().backward()
    engine.zero_grad()
    gradients: list[int] = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            sum(p.grad.numel() for p in engine.module.parameters() if p.grad is not None)
        )
    )
    ids = torch.randint(0, model["vocab_size"], (batch, model["n_positions"]))
    seconds, sent = [], []
    for _ in range(steps):
        began, before = time.process_time(), engine.replicas.num_bytes or 0
        engine.train_batch(iter([(ids, ids)]))
        seconds.append(time.process_time() - began)
        sent.append((engine.replicas.num_bytes or 0) - before)
    moments = [
        v.numel()
        for state in engine.optimizer.state.values()
        for key, v in state.items()
        if key != "step"
    ]
    every = replicas.get("every", 1)
    return {
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "block_parameters": sum(p.numel() for block in blocks for p in block.parameters()),
        "gradients": gradients[-1],
        "moments": sum(moments),
        "block_gflops": counter.get_total_flops() / 1e9,
        "step_cpu_seconds": statistics.median(seconds[2:]),
        "exchange_bytes": [amount for amount in sent if amount],
        "exchange_cpu_seconds": statistics.median(seconds[every - 1 :: every])
        if every > 1
        else None,
    }


def expected_bytes(
    one: dict[str, Any], whole: dict[str, Any], num_replicas: int
) -> dict[str, float]:
    """Bytes a replica sends, by the formulas: |W| is what is cut, |S| what is shared; weights and
    two moments travel."""
    cut = (whole["parameters"] - one["parameters"]) * num_replicas / (num_replicas - 1)
    shared = whole["parameters"] - cut
    part = (num_replicas - 1) / num_replicas
    return {
        "all_reduce_a_step": 2 * 4 * whole["parameters"] * part,
        "exchange": 3 * 4 * (cut * part / num_replicas + shared * 2 * part),
    }


def study_costs(pool: Pool, args: argparse.Namespace) -> list[dict[str, Any]]:
    model = model_config(256, 4, 512, 64)
    rows: list[dict[str, Any]] = []
    for count in (1, 2, 4):
        results = pool.run(costs_of, count, model, {**SUBNETS, "every": 3}, 4, 11, timeout=1800)
        row = {"replicas": count, **results[0]}
        if count > 1:
            row |= expected_bytes(row, rows[0], count)
            sent = [
                sum(result["exchange_bytes"]) / len(result["exchange_bytes"]) for result in results
            ]
            row["sent_an_exchange"] = statistics.mean(sent)
        rows.append(row)
        print(strict_json.dumps(row), flush=True)
    return rows


# --- quality --------------------------------------------------------------------------------------


def quality_of(
    folder: str,
    row: dict[str, Any],
    replicas: dict[str, Any],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> dict[str, Any]:
    """Validation loss of the merged model along the way."""
    from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches

    data = TokenData(folder)
    engine = build(
        model_config(64, 4, data.vocab_size, data.seq_len), row, replicas, batch, steps, lr, seed
    )
    shape = BatchShape(batch, 1, engine.dp_world_size, engine.replica_id)
    batches = training_batches(data, seed, 0, shape)
    validation = validation_batches(data, shape, 256)
    seconds, losses = 0.0, {}
    before = engine.replicas.num_bytes
    for step in range(1, steps + 1):
        began = time.process_time()
        engine.train_batch(batches)
        seconds += time.process_time() - began
        if step % max(1, steps // 3) == 0 or step == steps:
            engine.eval_batch(iter(validation), num_micro_batches=len(validation))
            losses[step] = engine.eval_losses[engine.num_segments - 1]
    tokens = steps * shape.per_step * data.seq_len
    sent = engine.replicas.num_bytes
    return {
        "losses": losses,
        "cpu_seconds": seconds,
        "sent_bytes": None if sent is None else sent - before,
        "tokens": tokens,
    }


def study_quality(pool: Pool, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def result_of(name: str, steps: int) -> dict[str, Any]:
        settings = (
            args.data,
            ROWS[args.row],
            SYNCS[name],
            steps,
            args.sequences // args.replicas,
            args.lr,
            args.seed,
        )
        return pool.run(quality_of, args.replicas, *settings, timeout=1800)[0]

    @cache
    def pace(name: str) -> float:
        return result_of(name, PACE_STEPS)["cpu_seconds"]

    for name in args.only or SYNCS:
        steps = round(args.steps * (pace("gradients") / pace(name) if args.equal_time else 1.0))
        rows.append(
            {
                "sync": name,
                "row": args.row,
                "replicas": args.replicas,
                "seed": args.seed,
                "steps": steps,
                **result_of(name, steps),
            }
        )
        print(strict_json.dumps(rows[-1]), flush=True)
        _write(args.json, rows)
    return rows


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each way of keeping replicas one model, seeds taken together; a table
    for each row and R."""
    lines = []
    for row, replicas in sorted({(r["row"], r["replicas"]) for r in rows}):
        lines += [
            f"| {row}, R = {replicas} | steps | seeds | loss (lowest-highest) | processor seconds "
            "of a replica | sent (MB) |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        here = [r for r in rows if (r["row"], r["replicas"]) == (row, replicas)]
        for sync in SYNCS:
            for steps in sorted({r["steps"] for r in here if r["sync"] == sync}):
                runs = [r for r in here if (r["sync"], r["steps"]) == (sync, steps)]
                last = [list(r["losses"].values())[-1] for r in runs]
                spread = f" ({min(last):.3f}-{max(last):.3f})" if len(last) > 1 else ""
                seconds = statistics.mean(r["cpu_seconds"] for r in runs)
                sent = runs[0]["sent_bytes"]
                cells = [
                    sync,
                    steps,
                    len(runs),
                    f"{statistics.mean(last):.3f}{spread}",
                    f"{seconds:.0f}",
                ]
                cells.append("-" if sent is None else f"{sent / 1e6:.1f}")
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path:
        write_file(path, strict_json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=["costs", "quality", "table"])
    parser.add_argument("files", type=Path, nargs="*", help="of quality, for the table")
    parser.add_argument("--json", type=output_file('"replicas"'), help="write the rows here")
    parser.add_argument("--data", help="folder written by scripts/prepare_data.py")
    parser.add_argument("--row", choices=ROWS, default="backprop", help="of the route table")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1, help="of weights and data order")
    parser.add_argument(
        "--equal-time",
        action="store_true",
        help="as many steps as take the processor time of --steps averages",
    )
    parser.add_argument("--sequences", type=int, default=16, help="in a step, over all replicas")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--only", nargs="*", choices=SYNCS, help="default all")
    args = parser.parse_args()
    if args.study == "quality" and not args.data:
        parser.error("quality needs --data")
    if args.study == "table":
        print(quality_table([row for file in args.files for row in json.loads(file.read_text())]))
        return
    pool = Pool()
    try:
        rows = {"costs": study_costs, "quality": study_quality}[args.study](pool, args)
    finally:
        pool.close()
    _write(args.json, rows)


if __name__ == "__main__":
    main()
