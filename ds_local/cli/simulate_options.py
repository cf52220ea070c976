"""The options of `simulate`, and which of them do nothing beside others."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_local.cli.arguments import (
    PAGE,
    PICTURE,
    SHEET,
    TRACE,
    Parser,
    number,
    number_or_auto,
    output_file,
    whole,
)
from ds_local.schedules.peers import PEERS
from ds_local.schedules.routes import MODES

_TIMES = ["--forward", "--input-grad", "--weight-grad", "--head"]
_OF_THE_MODE = [
    "--window",
    "--combine",
    "--backprop-micro-batches",
    "--correction",
    "--split-backward",
    "--run-ahead",
    "--schedule",
]


def parser_of(description: str | None) -> Parser:
    """What the command takes."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--stages", type=whole(1), required=True)
    add("--micro-batches", type=whole(1), required=True)
    add(
        "--mode",
        required=True,
        choices=[*MODES, *PEERS],
        help="a mode, or another pipeline's schedule",
    )
    add("--window", type=whole(1), help="of modes that take one")
    add("--combine", choices=["sum", "mean"], default="sum", help="of overlapping")
    add(
        "--backprop-micro-batches",
        type=number_or_auto,
        default=0,
        metavar="N|auto",
        help="micro-batches of the step that run real backpropagation; auto: as many as the "
        "pipeline hides",
    )
    add(
        "--correction",
        type=number(),
        default=0.0,
        help="how far these make up for what the others learn from, 0 to 1",
    )
    add(
        "--split-backward",
        type=int,
        choices=[0, 1, 2],
        default=0,
        help="defer weight gradients: 1 as ZB-H1, 2 as ZB-H2",
    )
    add(
        "--run-ahead",
        nargs="?",
        type=number_or_auto,
        const="auto",
        default=0,
        metavar="N|auto",
        help="forwards of later steps run ahead of the update, at most N; auto: as many as leave "
        "no stage waiting",
    )
    add("--segments-per-stage", type=whole(1), default=1)
    add(
        "--transfer",
        type=number(),
        default=0.0,
        help="time of a message, in forwards, that the order should reckon with",
    )
    add(
        "--compare",
        nargs="*",
        default=[],
        choices=[*MODES, *PEERS],
        help="schedules to show beside it",
    )
    _add_costs(parser)
    _add_output(parser)
    return parser


def _add_costs(parser: argparse.ArgumentParser) -> None:
    costs = parser.add_argument_group("times per segment and micro-batch, in any unit")
    costs.add_argument("--forward", type=number(), default=1.0)
    costs.add_argument("--input-grad", type=number(), default=1.0)
    costs.add_argument("--weight-grad", type=number(), default=1.0)
    costs.add_argument(
        "--head", type=number(), default=0.0, help="auxiliary head with its loss and gradients"
    )
    costs.add_argument(
        "--link", type=number(), default=0.0, help="time a message keeps a link busy"
    )
    costs.add_argument(
        "--profile", type=Path, help="measured times instead, from train.py --profile"
    )
    costs.add_argument(
        "--model",
        help="Hugging Face config: times from its floating-point operations, stages balanced by "
        "them",
    )
    costs.add_argument(
        "--deepspeed_config", help="with --model: head and partition options from this file"
    )
    costs.add_argument(
        "--seq-len", type=whole(1), help="with --model: tokens in a sequence; default the longest"
    )
    costs.add_argument(
        "--link-depth", type=whole(1), help="messages a link holds; default no limit"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("schedules as files")
    files.add_argument(
        "--schedule",
        nargs="+",
        metavar="FILE",
        help="the order, instead of our own: torch's CSV, or the text of a grid",
    )
    files.add_argument(
        "--csv",
        type=SHEET,
        help="write the order, as torch's pipelining reads it; of several, numbered",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        type=output_file('"makespan"'),
        help="file for the figures, - for the console instead of the grid",
    )
    output.add_argument(
        "--html", type=PAGE, help="page with the time lines, to zoom and to point at"
    )
    output.add_argument("--png", type=PICTURE, help="picture of the time lines")
    output.add_argument(
        "--steps", type=whole(1, 100), default=2, help="steps that --html and --png show; default 2"
    )
    output.add_argument("--trace", type=TRACE, help="Chrome/Perfetto trace of one step")


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Ends with a sentence about an option that would do nothing."""
    if args.mode in PEERS:
        why = f"is of our own modes, but --mode {args.mode} is another pipeline's schedule; leave "
        parser.refuse(args, _OF_THE_MODE, f"{why}it out, or take one of {', '.join(MODES)}")
        if not {*args.compare} & {*MODES}:
            parser.refuse(args, ["--transfer"], f"{why}it out, or --compare one of our own")
    elif args.mode != "overlapping":
        why = f"is of --mode overlapping, not of --mode {args.mode}; leave it out"
        parser.refuse(args, ["--combine"], why)
    if args.profile:
        why = "is not read beside --profile, which gives times; leave one of the two out"
        parser.refuse(args, ["--model", *_TIMES, "--link"], why)
    if args.model:
        why = (
            "is not read beside --model, which gives times by operations; leave one of the two out"
        )
        parser.refuse(args, _TIMES, why)
    else:
        why = "belongs to --model; add that, or leave it out"
        parser.refuse(args, ["--deepspeed_config", "--seq-len"], why)
    if not (args.html or args.png):
        why = "is of the pictures that --html and --png draw; add one of them, or leave it out"
        parser.refuse(args, ["--steps"], why)
