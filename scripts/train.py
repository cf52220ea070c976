"""Pretrain a causal language model over pipeline stages that learn from their own losses.

    deepspeed scripts/train.py --model configs/gpt2-nano.json --data data/python \\
        --output runs/nano --max-steps 300 --deepspeed --deepspeed_config ds_config.json
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from leaving import leave

from ds_local.cli.arguments import number_or_auto
from ds_local.schedules.routes import MODES


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="config.json in Hugging Face's form: fresh weights; model folder or hub name: "
        "starts from its safetensors, if it has any",
    )
    add("--from-scratch", action="store_true", help="fresh weights even if --model has some")
    add("--data", required=True, help="folder written by scripts/prepare_data.py")
    add(
        "--output",
        required=True,
        help="run folder: run.json, metrics.jsonl, checkpoints/, loss.png",
    )
    add(
        "--max-steps",
        type=int,
        required=True,
        help="optimizer steps in all, earlier ones of a resumed run included",
    )
    add("--eval-every", type=int, default=0, help="steps between validations; 0: only at the end")
    add("--eval-sequences", type=int, help="validation sequences to use; default all")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0: only at the end")
    add(
        "--resume",
        action="store_true",
        help="continue the run in --output from its latest checkpoint",
    )
    add(
        "--profile",
        action="store_true",
        help="write profile.json (for simulate.py) and trace.json (for Perfetto) at the end",
    )
    scheme = parser.add_argument_group(
        "scheme (instead of what the config file's local_parallel section says)"
    )
    scheme.add_argument("--num-stages", type=int, help="pipeline stages; default one per process")
    scheme.add_argument("--segments-per-stage", type=int)
    scheme.add_argument("--mode", choices=MODES)
    scheme.add_argument("--window", type=int, help="of modes that take one")
    scheme.add_argument(
        "--backprop-micro-batches",
        type=number_or_auto,
        metavar="N|auto",
        help="micro-batches of each step that run real backpropagation; auto: as many as the pipeline hides",
    )
    scheme.add_argument("--backprop-from", type=int, help="plain backpropagation from this step on")
    scheme.add_argument("--seed", type=int, help="of weights, dropout and data order")
    deepspeed = parser.add_argument_group("DeepSpeed")
    deepspeed.add_argument(
        "--deepspeed", action="store_true", help="accepted for DeepSpeed's sake; always on"
    )
    deepspeed.add_argument("--deepspeed_config", required=True, help="ds_config.json")
    deepspeed.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("LOCAL_RANK", str(max(args.local_rank, 0)))
    from ds_local.training import loop as train

    try:
        train.train(args)
        train.end_quietly()
    except (ValueError, RuntimeError, OSError) as error:
        if not train.running() and os.environ["LOCAL_RANK"] != "0":
            time.sleep(
                5
            )  # most likely all ranks found the same mistake; the first one says it, and the launcher ends the rest
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
