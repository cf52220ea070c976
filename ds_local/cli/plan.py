"""Which layout will be fastest on a cluster, how fast, and why the others lose. Starts nothing,
needs no device.

    python scripts/plan.py --model configs/gpt2-xl.json --nodes 8 --devices-per-node 8 \\
        --device-tflops 140 --memory-gib 80 --link-gbps 10 --intra-gbps 2400 --tokens 10e9
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_local.cli.arguments import Parser, number, output_file, whole
from ds_local.cluster.candidates import (
    GIB,
    HEADS,
    PRESENT_ROWS,
    ROWS,
    Cluster,
    Model,
    Price,
    measured_model,
)
from ds_local.cluster.planner import Plan, plan
from ds_local.cluster.pricing import Pricing
from ds_local.config import shipped, strict_json
from ds_local.model import families
from ds_local.outputs import write_file


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"config.json in Hugging Face's form, or a shipped one: {', '.join(shipped.MODELS)}",
    )
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
    add(
        "--batch-tokens",
        type=number(above=True),
        default=2**19,
        help="tokens of an optimizer step over all devices",
    )
    add("--seq-len", type=whole(1), help="default the model's longest")
    add("--tokens", type=number(above=True), help="of the whole run, for the hours it takes")
    add(
        "--heads", nargs="+", choices=HEADS, default=list(HEADS), help="auxiliary heads to consider"
    )
    text = "schemes to consider; default all but those that run ahead: older gradients teach less"
    add("--rows", nargs="+", choices=ROWS, default=PRESENT_ROWS, help=text)
    add("--fp32", action="store_true", help="instead of bf16 with fp32 master weights")
    add(
        "--profile",
        type=Path,
        help="profile.json of a run of this model: measured times instead of --device-tflops",
    )
    add("--best", type=whole(1), default=3, help="layouts to show in full")
    add(
        "--json",
        type=output_file('"too_large"'),
        help="file for all figures, - for the console instead of the text",
    )
    return parser.parse_args(arguments)


def line(price: Price, tokens: float | None) -> str:
    hours = f"{tokens / price.tokens_per_second / 3600:>9,.1f}" if tokens else ""
    return (
        f"{price.tokens_per_second:>12,.0f}  {price.idle_share:>5.0%}  {price.memory / GIB:>7.1f}  "
        f"{price.bytes_per_edge / 1e9:>7.2f}  {price.bytes_reduced / 1e9:>7.2f}  {hours}  "
        f"{price.candidate}"
    )


def report(found: Plan, args: argparse.Namespace) -> str:
    head = (
        f"{'tokens/s':>12}  {'idle':>5}  {'GiB':>7}  {'GB/edge':>7}  {'GB/red.':>7}  {'hours':>9}  "
        "layout"
    )
    if not args.tokens:
        head = head.replace(f"{'hours':>9}  ", "  ")
    if not found.best:
        return "nothing fits\n" + _too_large(found, args.memory_gib)
    everything = sorted(
        [*found.best, *(p for rest in found.runners_up.values() for p in rest)],
        key=lambda p: p.step_seconds,
    )
    best, *others = found.best
    lines = [head, *(line(price, args.tokens) for price in everything[: args.best])]
    lines += ["", "the best of every other row, and what costs it most:"]
    for price in others:
        lines.append(
            f"{best.step_seconds / price.step_seconds:>6.0%} of the best  {price.candidate}: "
            f"{price.loss}"
        )
    lines.append(_too_large(found, args.memory_gib))
    return "\n".join(lines).rstrip()


def _too_large(found: Plan, memory_gib: float) -> str:
    return "\n".join(
        f"does not fit    {price.candidate}: {price.memory / GIB:,.0f} GiB on a device of "
        f"{memory_gib:g}"
        for price in found.too_large.values()
    )


def as_json(price: Price) -> dict[str, Any]:
    return asdict(price) | {"tokens_per_second": price.tokens_per_second, "loss": price.loss}


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
        model = measured_model(model, args.profile)
    pricing = Pricing(model, cluster, int(args.batch_tokens) // model.seq_len)
    found = plan(pricing, args.heads, args.rows)
    if args.json:
        result = {
            "best": [as_json(p) for p in found.best],
            "too_large": [as_json(p) for p in found.too_large.values()],
        }
        text = strict_json.dumps(result, indent=1)
        if str(args.json) == "-":
            print(text)
            return 0
        write_file(args.json, text + "\n")
    print(report(found, args))
    print(
        f"{found.considered} layouts of {cluster.devices} devices, {found.simulated} simulated, "
        f"{time.perf_counter() - started:.1f} s; GB/edge: activations over a link between two "
        "stages in a step, GB/red.: sent by a device to average gradients"
    )
    return 0 if found.best else 1
