"""Which layout of a cluster comes to a loss first, how fast, and why the others lose. Starts
nothing, needs no device.

    python scripts/plan.py --model configs/gpt2-xl.json --nodes 8 --devices-per-node 8 \\
        --device-tflops 140 --memory-gib 80 --link-gbps 10 --intra-gbps 2400 --tokens 10e9 \\
        --write plans/xl
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_local.cli.arguments import Parser, number, output_file, whole
from ds_local.cluster.candidates import (
    DEFAULT_SCHEMES,
    HEADS,
    PLANNED,
    TAILS,
    Cluster,
    Model,
    measured_model,
)
from ds_local.cluster.job import CONFIG, START, config_of, start_of, steps_for
from ds_local.cluster.layout_table import report
from ds_local.cluster.planner import plan
from ds_local.cluster.prices import Price
from ds_local.cluster.pricing import Pricing
from ds_local.cluster.scaling import ALONE, MOST_DEVICES, picture, scaling, tables
from ds_local.config import shipped, strict_json
from ds_local.model import families
from ds_local.outputs import new_folder, write_file

_SCHEMES_HELP = (
    "schemes to consider; default all but those that run ahead (older gradients teach less) and, "
    "with --write and no --tokens, those with a tail (its first step is not known)"
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"config.json in Hugging Face's form, or a shipped one: {', '.join(shipped.MODELS)}",
    )
    _add_cluster(add)
    add(
        "--batch-tokens",
        type=number(above=True),
        default=2**19,
        help="tokens of an optimizer step over all devices",
    )
    add("--seq-len", type=whole(1), help="default the profiled run's, or the model's longest")
    add(
        "--tokens",
        type=number(above=True),
        help="that backpropagation would train on, for the hours until each scheme is as good",
    )
    add(
        "--tokens-only",
        action="store_true",
        help="rank by tokens per second, as if every scheme learnt as much from a token",
    )
    add(
        "--heads", nargs="+", choices=HEADS, default=list(HEADS), help="auxiliary heads to consider"
    )
    add("--schemes", nargs="+", metavar="SCHEME", choices=[*PLANNED, *TAILS], help=_SCHEMES_HELP)
    add("--fp32", action="store_true", help="instead of bf16 with fp32 master weights")
    add(
        "--profile",
        type=Path,
        help="profile.json of a run of this model: measured times instead of --device-tflops",
    )
    add("--best", type=whole(1), default=3, help="layouts to show in full")
    add(
        "--write",
        metavar="FOLDER",
        help=f"write the best layout there, ready to start: {CONFIG} and {START}",
    )
    add(
        "--scaling",
        choices=["fixed", "growing"],
        help=f"tokens per second of a device for every number of stages and replicas up to "
        f"{MOST_DEVICES:,} devices; the step stays as large as it is, or grows with the replicas",
    )
    add("--svg", type=output_file("<svg"), help="with --scaling: a picture")
    add(
        "--json",
        type=output_file('"too_large"'),
        help="file for all figures, - for the console instead of the text",
    )
    args = parser.parse_args(arguments)
    _check(parser, args)
    args.schemes = args.schemes or _schemes_of(args)
    return args


def _schemes_of(args: argparse.Namespace) -> list[str]:
    """Those to consider where none are asked for."""
    tails = args.tokens is not None or not args.write
    return [scheme for scheme in DEFAULT_SCHEMES if tails or scheme not in TAILS]


def _check(parser: Parser, args: argparse.Namespace) -> None:
    """Ends with a sentence about an option that would do nothing, or lacks another."""
    tails = [scheme for scheme in args.schemes or () if scheme in TAILS]
    if args.write and tails and args.tokens is None:
        parser.error(
            f"{tails[0]!r} changes the scheme late in the run, and --write cannot say at which "
            "step; give --tokens, or leave that scheme out"
        )
    if args.scaling:
        why = "is for the best layout, which --scaling does not look for; leave one of the two out"
        parser.refuse(args, ["--write", "--tokens", "--tokens-only", "--best"], why)
    else:
        parser.refuse(args, ["--svg"], "draws what --scaling finds; add --scaling, or leave it out")


def _add_cluster(add: Callable[..., object]) -> None:
    add("--nodes", type=whole(1), required=True)
    add("--devices-per-node", type=whole(1), required=True)
    add(
        "--device-tflops",
        type=number(above=True),
        required=True,
        help="sustained in training: peak times the share that is reached",
    )
    add("--memory-gib", type=number(above=True), required=True, help="of a device")
    add(
        "--link-gbps",
        type=number(above=True),
        required=True,
        help="of a node's network card, each way, shared by its devices",
    )
    add(
        "--intra-gbps",
        type=number(above=True),
        required=True,
        help="between two devices of a node, each way",
    )
    add("--latency-us", type=number(), default=50, help="of a message between nodes")


def as_json(price: Price) -> dict[str, Any]:
    names = ("tokens_per_second", "device_tokens_per_second", "loss")
    return asdict(price) | {name: getattr(price, name) for name in names}


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    started = time.perf_counter()
    cluster = Cluster(
        args.nodes,
        args.devices_per_node,
        args.device_tflops,
        args.memory_gib,
        args.link_gbps,
        args.intra_gbps,
        args.latency_us * 1e-6,
    )
    model = Model.of(families.load_model_config(args.model), args.seq_len, 4 if args.fp32 else 2)
    if args.profile:
        model = measured_model(model, args.profile, args.seq_len)
    sequences = int(args.batch_tokens) // model.seq_len
    if args.scaling:
        return show_scaling(model, cluster, sequences, args)
    pricing = Pricing(model, cluster, sequences, tokens_only=args.tokens_only)
    found = plan(pricing, args.heads, args.schemes)
    if args.json:
        result = {
            "best": [as_json(p) for p in found.best],
            "too_large": [as_json(p) for p in found.too_large.values()],
        }
        write_figures(result, args)
    if not _for_programs(args):
        ratio = None if args.tokens_only else model.ratio
        print(report(found, args.memory_gib, args.tokens, args.best, ratio))
        print(
            f"{found.considered} layouts of {cluster.devices} devices, {found.simulated} "
            f"simulated, {time.perf_counter() - started:.1f} s; 8 x 4 sequences: 8 micro-batches "
            "of 4 in a step of a replica; GB/edge: activations over a link between two stages in a "
            "step"
        )
    if args.write and found.best:
        write_job(found.best[0], cluster, args, model.config.vocab_size)
    elif args.write:
        print(f"no layout fits, so {args.write} is not written", file=sys.stderr)
    return 0 if found.best else 1


def _for_programs(args: argparse.Namespace) -> bool:
    """The console gets the figures as JSON, and nothing else."""
    return str(args.json) == "-"


def write_figures(found: Any, args: argparse.Namespace) -> None:
    text = strict_json.dumps(found, indent=1)
    if _for_programs(args):
        print(text)
    else:
        write_file(args.json, text + "\n")


def show_scaling(model: Model, cluster: Cluster, sequences: int, args: argparse.Namespace) -> int:
    """Tables over stages and replicas, and what was asked for besides."""
    started = time.perf_counter()
    schemes = list(dict.fromkeys([ALONE, *args.schemes]))
    cells = scaling(model, cluster, sequences, args.heads, schemes, args.scaling == "growing")
    if args.json:
        found = [cell._asdict() | {"price": cell.price and as_json(cell.price)} for cell in cells]
        write_figures(found, args)
    if not _for_programs(args):
        print(tables(cells))
        print(f"{len(cells)} layouts, {time.perf_counter() - started:.1f} s")
    if args.svg:
        write_file(args.svg, picture(cells).file())
    return 0 if any(cell.price for cell in cells) else 1


def write_job(price: Price, cluster: Cluster, args: argparse.Namespace, vocab_size: int) -> None:
    """The layout as files, and the command that starts it."""
    steps = steps_for(price, args.tokens)
    config = config_of(price.candidate, args.fp32, steps, vocab_size)
    with new_folder(args.write, "plan") as folder:
        (folder / CONFIG).write_text(strict_json.dumps(config, indent=2) + "\n")
        (folder / START).write_text(start_of(price, cluster, args.model, args.write, steps))
    said = sys.stderr if _for_programs(args) else sys.stdout
    print(f"start it with: DATA=... RUN=... bash {args.write}/{START}", file=said)
