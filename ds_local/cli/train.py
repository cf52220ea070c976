"""Pretrain a causal language model over pipeline stages that learn from their own losses.

    deepspeed scripts/train.py --model configs/gpt2-nano.json --data data/python \\
        --output runs/nano --max-steps 300 --deepspeed --deepspeed_config ds_config.json
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from ds_local.cli.arguments import Parser, kinds_of_change, number_or_auto, whole
from ds_local.config import shipped
from ds_local.config.changes import CHANGES
from ds_local.config.command_line import read_settings
from ds_local.schedules.routes import MODES
from ds_local.training.signals import Signals


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="config.json in Hugging Face's form, or the name of a shipped one "
        f"({', '.join(shipped.MODELS)}): fresh weights; model folder or hub name: starts from its "
        "safetensors, if it has any",
    )
    add("--from-scratch", action="store_true", help="fresh weights even if --model has some")
    add("--data", required=True, help="folder written by scripts/prepare_data.py")
    add(
        "--output",
        required=True,
        help="run folder: run.json, metrics.jsonl, checkpoints/, report.html, loss.png",
    )
    _add_loop(add)
    _add_scheme(parser)
    _add_deepspeed(parser)
    return parser.parse_args(arguments)


def _add_loop(add: Callable[..., object]) -> None:
    add(
        "--max-steps",
        type=whole(1),
        required=True,
        help="optimizer steps in all, earlier ones of a resumed run included",
    )
    add(
        "--eval-every",
        type=whole(),
        default=0,
        help="steps between validations; 0: only at the end",
    )
    add("--eval-sequences", type=whole(1), help="validation sequences to use; default all")
    add(
        "--sample-tokens",
        type=whole(),
        default=0,
        metavar="N",
        help="after each validation the model continues a validation sequence by N tokens, each as "
        "slow as a micro-batch of validation; shown on the console and in report.html",
    )
    add(
        "--save-every",
        type=whole(),
        default=0,
        help="steps between checkpoints; 0: only at the end",
    )
    add(
        "--resume",
        action="store_true",
        help="continue the run in --output from its latest checkpoint; start it where there is "
        "none",
    )
    add(
        "--allow-change",
        type=kinds_of_change,
        default=[],
        metavar="KIND[,KIND...]",
        help="what a resumed run may change, if it does: "
        + "; ".join(f"{kind} ({meaning})" for kind, meaning in CHANGES.items()),
    )
    add(
        "--profile",
        action="store_true",
        help="write profile.json (for simulate.py) and trace.json (for Perfetto) at the end",
    )


def _add_scheme(parser: argparse.ArgumentParser) -> None:
    scheme = parser.add_argument_group(
        "scheme (instead of what the config file's local_parallel section says)"
    )
    scheme.add_argument(
        "--num-stages", type=whole(1), help="pipeline stages; default one per process"
    )
    scheme.add_argument("--segments-per-stage", type=whole(1))
    scheme.add_argument("--mode", choices=MODES)
    scheme.add_argument("--window", type=whole(1), help="of modes that take one")
    scheme.add_argument(
        "--backprop-micro-batches",
        type=number_or_auto,
        metavar="N|auto",
        help="micro-batches of each step that run real backpropagation; auto: as many as the "
        "pipeline hides",
    )
    scheme.add_argument(
        "--backprop-from", type=whole(1), help="plain backpropagation from this step on"
    )
    scheme.add_argument("--seed", type=whole(), help="of weights, dropout and data order")


def _add_deepspeed(parser: argparse.ArgumentParser) -> None:
    deepspeed = parser.add_argument_group("DeepSpeed")
    deepspeed.add_argument(
        "--deepspeed", action="store_true", help="accepted for DeepSpeed's sake; always on"
    )
    deepspeed.add_argument(
        "--deepspeed_config",
        required=True,
        help=f"ds_config.json, or the name of a shipped one ({', '.join(shipped.DEEPSPEED)})",
    )
    deepspeed.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    config = read_settings(args)  # most mistakes are said before the seconds that torch takes
    os.environ.setdefault("LOCAL_RANK", str(max(args.local_rank, 0)))
    with Signals() as signals:
        from ds_local.engine.deepspeed_checks import checked

        checked(config)  # the others before those that transformers and datasets take
        from ds_local.training import loop

        loop.train(args, signals)
        loop.end_quietly()
    return 0
