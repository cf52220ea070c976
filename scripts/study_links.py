"""What activation compression costs in loss: the same local training with every codec, in one
process, at equal tokens.

    python scripts/study_links.py --data data/python-512 --json links.json \\
        --codecs none bf16 int8 int4:group_size=32 lowrank:rank=32

The model is cut into segments with links in memory, which carry what links between stages carry.
Every run sees the same weights at the start and the same data. The last segment's validation loss
is measured twice: over the links as trained, and without the codec, as the exported model is used.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ds_local.cli.arguments import output_file
from ds_local.config import strict_json
from ds_local.config.deepspeed import adamw, cosine
from ds_local.config.files import load_config
from ds_local.links.trees import Tree
from ds_local.measure.ranks import Pool
from ds_local.outputs import write_file


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of scripts/prepare_data.py")
    add("--model", default="configs/gpt2-nano.json", help="its vocabulary is set to the data's")
    add(
        "--codecs",
        nargs="+",
        required=True,
        help="NAME or NAME:OPTION=VALUE, ... of local_parallel.link",
    )
    add("--segments", type=int, default=4)
    add("--mode", default="local")
    add("--steps", type=int, default=600)
    add("--micro-batch-size", type=int, default=16)
    add("--micro-batches", type=int, default=1)
    add("--learning-rate", type=float, default=2e-3)
    add("--token-fraction", type=float, default=0.5, help="of the positions in auxiliary losses")
    add("--eval-sequences", type=int, default=256)
    add("--seed", type=int, default=1234)
    add("--bf16", action="store_true")
    add("--timeout", type=float, default=7200, help="seconds for one run")
    add(
        "--json",
        type=output_file('"codec"'),
        help="results, one object per codec; runs that are in it already are not repeated",
    )
    return parser.parse_args()


def link_of(text: str) -> dict[str, Any]:
    """ "topk:keep=0.1" -> {"codec": "topk", "keep": 0.1}"""
    name, _, options = text.partition(":")
    pairs = (option.split("=") for option in options.split(",") if option)
    return {"codec": name, **{key: json.loads(value) for key, value in pairs}}


def config_of(args: argparse.Namespace, codec: str) -> dict[str, Any]:
    return load_config(
        {
            "train_micro_batch_size_per_gpu": args.micro_batch_size,
            "gradient_accumulation_steps": args.micro_batches,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "bf16": {"enabled": args.bf16},
            "optimizer": adamw(args.learning_rate),
            "scheduler": cosine(args.steps, max(1, args.steps // 10)),
            "local_parallel": {
                "mode": args.mode,
                "segments_per_stage": args.segments,
                "link": link_of(codec),
                "seed": args.seed,
                "head": {"token_fraction": args.token_fraction},
            },
        }
    )


def run(args: argparse.Namespace, codec: str) -> dict[str, Any]:
    import ds_local
    from ds_local.data.dataset import BatchShape, TokenData, training_batches, validation_batches

    data, config = TokenData(args.data), config_of(args, codec)
    model = {**json.loads(Path(args.model).read_text()), "vocab_size": data.vocab_size}
    module = ds_local.causal_lm(model, config=config, seq_len=data.seq_len)
    engine = ds_local.initialize(model=module, config=config)[0]
    shape = BatchShape(args.micro_batch_size, args.micro_batches, 1, 0)
    batches = training_batches(data, args.seed, 0, shape)
    began = time.perf_counter()
    for _ in range(args.steps):
        engine.train_batch(batches)
    seconds = time.perf_counter() - began
    hidden = module.run_segment(0, next(batches)[0])
    message = engine.executor.message(0, Tree.of(hidden), Tree.of(None))
    num_bytes = sum(t.nbytes for name, t in message.items() if name.startswith("hidden"))

    def evaluate() -> dict[int, float]:
        validation = validation_batches(data, shape, args.eval_sequences)
        engine.eval_batch(iter(validation), num_micro_batches=len(validation))
        return engine.eval_losses

    over_links = evaluate()
    engine.section = engine.section.model_copy(update={"link": type(engine.section.link)()})
    exported = evaluate()
    return {
        "codec": codec,
        "seed": args.seed,
        "steps": args.steps,
        "tokens": args.steps * shape.per_step * data.seq_len,
        "mode": args.mode,
        "bf16": args.bf16,
        "bytes_per_token": num_bytes / hidden[..., 0].numel(),
        "ratio_to_fp32": hidden.numel() * 4 / num_bytes,
        "loss": over_links[args.segments - 1],
        "loss_exported": exported[args.segments - 1],
        "losses": over_links,
        "seconds": seconds,
    }


def main() -> None:
    args = parse_arguments()
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {(row["codec"], row["seed"], row["steps"], row["mode"], row["bf16"]) for row in rows}
    pool = Pool()
    for codec in args.codecs:
        if (codec, args.seed, args.steps, args.mode, args.bf16) not in done:
            rows += pool.run(run, 1, args, codec, timeout=args.timeout)
            if args.json:
                write_file(args.json, strict_json.dumps(rows, indent=1) + "\n")
    pool.close()
    plain = {row["seed"]: row["loss"] for row in rows if row["codec"] == "none"}
    print(
        f"{'codec':<24} {'seed':>5} {'bytes/token':>11} {'of fp32':>8} {'loss':>8} {'change':>8} "
        f"{'exported':>9}"
    )
    for row in rows:
        change = (
            f"{row['loss'] / plain[row['seed']] - 1:>+8.2%}"
            if row["seed"] in plain
            else f"{'-':>8}"
        )
        print(
            f"{row['codec']:<24} {row['seed']:>5} {row['bytes_per_token']:>11.1f} "
            f"{1 / row['ratio_to_fp32']:>8.1%} {row['loss']:>8.4f} {change} "
            f"{row['loss_exported']:>9.4f}"
        )


if __name__ == "__main__":
    main()
