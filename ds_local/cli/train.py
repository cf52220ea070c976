"""Pretrain a causal language model over pipeline stages that learn from their own losses.

    deepspeed scripts/train.py --model configs/gpt2-nano.json --data data/python-stdlib \\
        --output runs/nano --max-steps 300 --deepspeed --deepspeed_config ds_config.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ds_local.cli.arguments import (
    Parser,
    kinds_of_change,
    number,
    number_or_auto,
    whole,
    with_file,
    words_of,
)
from ds_local.config import shipped
from ds_local.config.changes import CHANGES
from ds_local.config.command_line import read_settings
from ds_local.errors import ConfigError
from ds_local.schedules.routes import MODES
from ds_local.training.signals import Signals

if TYPE_CHECKING:
    from ds_local.training.callbacks import Callback, Validation

_SWITCH = argparse.BooleanOptionalAction


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser, words = _parser(), sys.argv[1:] if arguments is None else arguments
    try:
        words = with_file(parser, words)
    except ConfigError as error:
        parser.error(str(error))
    return _checked(parser, words)


def _checked(parser: Parser, words: list[str]) -> argparse.Namespace:
    args = parser.parse_args(words)
    if args.max_steps is None and args.epochs is None:
        parser.error("one of --max-steps and --epochs is required")
    if args.stop_after_worse and not args.eval_every:
        parser.error("--stop-after-worse needs validations; give --eval-every")
    if args.unit is None:
        why = "counts the starts of a unit; give --unit, or leave it out"
        parser.refuse(args, ["--most-starts-per-hour"], why)
    return args


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--arguments",
        metavar="FILE",
        help="a YAML or JSON file of these options by name (max_steps: 300); what the command line "
        "says too comes from there",
    )
    add(
        "--model",
        required=True,
        help="config.json in Hugging Face's form, or the name of a shipped one "
        f"({', '.join(shipped.MODELS)}): fresh weights; model folder or hub name: starts from its "
        "safetensors, if it has any",
    )
    add(
        "--from-scratch",
        action=_SWITCH,
        default=False,
        help="fresh weights even if --model has some",
    )
    add("--data", required=True, help="folder written by scripts/prepare_data.py")
    add(
        "--output",
        required=True,
        help="run folder: run.json, metrics.jsonl, checkpoints/, report.html, loss.png",
    )
    _add_length(parser)
    _add_saving(parser)
    _add_scheme(parser)
    _add_unit(parser)
    _add_deepspeed(parser)
    return parser


def _add_length(parser: Parser) -> None:
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--max-steps",
        type=whole(1),
        help="optimizer steps in all, earlier ones of a resumed run included",
    )
    length.add_argument(
        "--epochs",
        type=number(above=True),
        metavar="E",
        help="instead of --max-steps: passes over the training sequences, also parts of one",
    )
    add(
        "--eval-every",
        type=whole(),
        default=0,
        help="steps between validations, the first one before any training; 0: only at the end",
    )
    add(
        "--eval-sequences",
        type=whole(1),
        help="validation sequences to use, by default all of them",
    )
    add(
        "--eval-ema",
        action=_SWITCH,
        default=False,
        help="validate the running averages of the weights (local_parallel.ema), not the weights",
    )
    add(
        "--sample-tokens",
        type=whole(),
        default=0,
        metavar="N",
        help="after each validation the model continues a validation sequence by N tokens, each as "
        "slow as a micro-batch of validation; shown on the console and in report.html",
    )
    add(
        "--stop-after-worse",
        type=whole(),
        default=0,
        metavar="N",
        help="end the run after N validations in a row without a lower loss of the full model; 0: "
        "never",
    )
    add(
        "--dry-run",
        action=_SWITCH,
        default=False,
        help="check everything, let the ranks meet, run two steps and say what the run would take; "
        "nothing is written",
    )


def _add_saving(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--save-every",
        type=whole(),
        default=0,
        help="steps between checkpoints; 0: only at the end",
    )
    add(
        "--keep-last",
        type=whole(),
        default=0,
        metavar="K",
        help="remove older checkpoints but for the last K; 0: keep all",
    )
    add(
        "--keep-best",
        action=_SWITCH,
        default=False,
        help="save RUN/checkpoints/best at each validation with the least loss so far",
    )
    add(
        "--resume",
        action=_SWITCH,
        default=False,
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
        action=_SWITCH,
        default=False,
        help="write profile.json (for simulate.py) and trace.json (for Perfetto) at the end",
    )


def _add_scheme(parser: Parser) -> None:
    scheme = parser.add_argument_group(
        "scheme (instead of what the config file's local_parallel section says)"
    )
    scheme.add_argument(
        "--num-stages", type=whole(1), help="pipeline stages, by default one per process"
    )
    scheme.add_argument("--segments-per-stage", type=whole(1), help="instead of the config's")
    scheme.add_argument("--mode", choices=MODES, help="instead of the config's")
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


def _add_unit(parser: Parser) -> None:
    unit = parser.add_argument_group(
        "stages that may die alone (link.reconnect_seconds): a job for each unit of stages"
    )
    unit.add_argument(
        "--unit",
        type=whole(),
        metavar="N",
        help="this job is the N-th unit, from 0; its run is in OUTPUT/unit-N. Use --resume: one "
        "command starts it, and again after it died",
    )
    unit.add_argument(
        "--replicas", type=whole(1), default=1, metavar="R", help="copies of the pipeline"
    )
    unit.add_argument(
        "--replica",
        type=whole(),
        default=0,
        metavar="N",
        help="this job is in the N-th copy, from 0; its run is in OUTPUT/unit-N-replica-N",
    )
    unit.add_argument(
        "--most-starts-per-hour",
        type=whole(),
        default=20,
        metavar="N",
        help="a unit that was started so often within an hour is refused; 0: any number",
    )


def _add_deepspeed(parser: Parser) -> None:
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
    os.environ.setdefault("LOCAL_RANK", str(max(args.local_rank, 0)))
    _start(args, ())
    return 0


def train(
    *, callbacks: Sequence[Callback] = (), handle_signals: bool = False, **options: Any
) -> Validation | None:
    """A whole run, as `scripts/train.py` makes it, from a script or a notebook: the same options
    as keywords, `max_steps=300` for `--max-steps 300`.

        ds_local.train(model="gpt2-nano.json", data="data/python-stdlib", output="runs/nano",
                       deepspeed_config="ds_config.json", max_steps=300, eval_every=50)

    All ranks call it; a process that no launcher started is the only one.

    Args:
        callbacks: objects that are told of steps, validations and saves; see `Callback`.
        handle_signals: SIGTERM, SIGINT and SIGHUP save and leave, as in `scripts/train.py`; before
            the first step they end the process at once. In the main thread only.
        options: of `scripts/train.py`; `deepspeed_config` may be the dict itself.

    Returns:
        The last validation; None when it was not reached, or with `dry_run=True`.

    Raises:
        ConfigError, DataError, RunError, ...: in a sentence, as on the command line.
    """
    parser = _parser()
    parser.in_script = True
    config = options.get("deepspeed_config")
    if isinstance(config, dict):
        options["deepspeed_config"] = "given as a dict"
    args = _checked(parser, words_of(parser, options, "ds_local.train"))
    if isinstance(config, dict):
        args.deepspeed_config = config
    return _start(args, callbacks, handle_signals)


def _start(
    args: argparse.Namespace, callbacks: Sequence[Callback], handle_signals: bool = True
) -> Validation | None:
    config = read_settings(args)  # most mistakes are said before the seconds that torch takes
    with Signals() if handle_signals else nullcontext() as signals:
        from ds_local.engine.deepspeed_checks import checked

        checked(config)  # the others before those that transformers and datasets take
        from ds_local.training import loop

        last = loop.train(args, signals, callbacks)
        loop.end_quietly()
    return last
