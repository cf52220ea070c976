"""Measure this package beside the pipelines one could use instead. What came of it:
docs/benchmarks.md.

python scripts/benchmark.py schedules --stages 4 --json out/schedules.json --png out/schedules.png
python scripts/benchmark.py links     --json out/links.json
python scripts/benchmark.py memory    --json out/memory.json
python scripts/benchmark.py real      --data DIR --json out/real.json
python scripts/benchmark.py heads     --json out/heads.json
python scripts/benchmark.py gpu       --json out/gpu.json
python scripts/benchmark.py table out/*.json         the Markdown tables of earlier runs

schedules, links and memory start real processes whose compute is sleep; they need few cores, but
quiet ones.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# before torch and DeepSpeed are imported, here and in the ranks
os.environ.setdefault("OMP_NUM_THREADS", "1")

from ds_local.cli.arguments import PICTURE, Parser, number, output_file, whole
from ds_local.measure import network, pictures, report
from ds_local.measure.gpu_rows import has_failed_tests
from ds_local.measure.ranks import Pool
from ds_local.measure.relay import Relay
from ds_local.measure.sleeping import Times
from ds_local.measure.sweep import Setting, sweep
from ds_local.measure.systems import System, choose
from ds_local.measure.tables import Row

WIDTH = 256  # of the real layers in `memory`
COUNT, SIZE = whole(1), number()  # types of options


def schedules(args: argparse.Namespace) -> list[Row]:
    settings = [
        Setting(p, m, _times(args), network.Shape())
        for p in args.stages
        for m in args.micro_batches
    ]
    pool = Pool()
    try:
        return _collect(
            args, sweep(settings, choose(args.systems), args.repeats, pool, _tracer(args.trace))
        )
    finally:
        pool.close()


def links(args: argparse.Namespace) -> list[Row]:
    """Speed, one interface for each rank behind a token bucket; then delay, every frame held back
    by a relay."""
    if network.INSIDE not in os.environ:
        reason = network.refusal()
        if reason is None:
            network.rerun_inside()
        print(f"links are not measured: this system does not allow network namespaces ({reason})")
        return []
    systems = choose(
        args.systems or ["local:local", "mixed", "backprop", "deepspeed:1F1B", "torch", "async"]
    )
    systems = [system for system in systems if not system.head]
    rows: list[Row] = []
    for kind, values in (("rate", args.ratios), ("delay", args.delays)):
        if not values:
            continue
        floats = args.activation_bytes // 4 if kind == "rate" else 64
        times = _times(args, floats=floats)
        relay = (
            Relay([f"{network.interfaces(False)}{rank}" for rank in range(args.stages)])
            if kind == "delay"
            else None
        )
        pool = network.pool(bridge=relay is None)
        try:
            for value in values:
                if relay is not None:
                    relay.delay_seconds = value / 1000
                shape = network.Shape(delay_seconds=value / 1000)
                if relay is None:
                    shape = network.Shape(
                        bits_per_second=floats * 32 / (value * args.seconds) if value else 0.0
                    )
                found = sweep(
                    [Setting(args.stages, args.micro_batches, times, shape)],
                    systems,
                    args.repeats,
                    pool,
                )
                rows += [row | {"sweep": kind} for batch in found for row in batch]
                report.save(rows, args.json, args.benchmark)
        finally:
            pool.close()
            if relay is not None:
                relay.close()
    return rows


def memory(args: argparse.Namespace) -> list[Row]:
    times = Times(
        0.002, 0.002, 0.002, 0.0, floats=WIDTH * args.rows, layers=args.layers, width=WIDTH
    )
    systems = [system for system in choose(args.systems) if not system.head]
    pool = Pool()
    try:
        return _collect(
            args,
            sweep(
                [Setting(p, args.micro_batches, times, network.Shape()) for p in args.stages],
                systems,
                1,
                pool,
            ),
        )
    finally:
        pool.close()


def _collect(args: argparse.Namespace, batches: Any) -> list[Row]:
    rows: list[Row] = []
    for batch in batches:
        rows += batch
        report.save(rows, args.json, args.benchmark)  # what is there survives an interruption
    return rows


def _times(args: argparse.Namespace, **more: Any) -> Times:
    return Times(args.seconds, args.seconds, args.seconds, **more)


def _tracer(folder: Path | None) -> Callable[..., None] | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)

    def write(system: System, setting: Setting, results: list[dict[str, Any]]) -> None:
        name = re.sub(r"\W+", "_", system.name).strip("_")
        path = folder / f"{name}_p{setting.stages}_m{setting.micro_batches}.json"
        pictures.write_trace([rank["events"] for rank in results], path)

    return write


def real(args: argparse.Namespace) -> list[Row]:
    from ds_local.measure import real as module

    return module.measure(args)


def heads(args: argparse.Namespace) -> list[Row]:
    from ds_local.measure import heads as module

    return module.measure(args)


def gpu(args: argparse.Namespace) -> list[Row]:
    from ds_local.measure import gpu as module

    return module.measure(args)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    def command(function: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=text)
        sub.set_defaults(run=function)
        sub.add_argument("--json", type=output_file('"benchmark"'), help="file for the rows")
        return sub

    def compared(sub: argparse.ArgumentParser, repeats: int) -> None:
        sub.add_argument(
            "--systems",
            nargs="+",
            help="parts of names such as ds_local:local or torch:ZBV; default all that fit",
        )
        sub.add_argument("--repeats", type=COUNT, default=repeats)

    sub = command(schedules, "sleeping stages: every pipeline at several numbers of micro-batches")
    compared(sub, 3)
    sub.add_argument("--stages", type=COUNT, nargs="+", default=[4, 8])
    sub.add_argument("--micro-batches", type=COUNT, nargs="+", default=[1, 2, 4, 8, 16])
    sub.add_argument(
        "--seconds",
        type=SIZE,
        default=0.05,
        help="of a stage's forward, input gradient and weight gradient each",
    )
    sub.add_argument("--png", type=PICTURE)
    sub.add_argument("--trace", type=Path, help="folder for a Chrome/Perfetto trace of each system")

    sub = command(links, "the same over slow and distant links, each rank in a network namespace")
    compared(sub, 2)
    sub.add_argument("--stages", type=COUNT, default=4)
    sub.add_argument("--micro-batches", type=COUNT, default=8)
    sub.add_argument("--seconds", type=SIZE, default=0.05)
    sub.add_argument(
        "--ratios",
        type=SIZE,
        nargs="*",
        default=[0, 0.25, 0.5, 1, 2, 3, 6],
        help="c/F: link time over forward time",
    )
    delays = [0, 10, 50, 100]
    sub.add_argument("--delays", type=SIZE, nargs="*", default=delays, help="one way, in ms")
    sub.add_argument("--activation-bytes", type=COUNT, default=1_250_000)

    _add_real_compute(command, compared)

    sub = commands.add_parser("table", help="Markdown tables from --json files")
    sub.add_argument("files", type=Path, nargs="+")
    sub.add_argument("--png", type=PICTURE, help="bars of the schedules in them")
    return parser.parse_args(arguments)


def _add_real_compute(
    command: Callable[..., argparse.ArgumentParser],
    compared: Callable[[argparse.ArgumentParser, int], None],
) -> None:
    """The benchmarks whose compute is real."""
    sub = command(memory, "what stays alive for the backward passes, and how far processes grow")
    compared(sub, 1)
    sub.add_argument("--stages", type=COUNT, nargs="+", default=[2, 4, 8])
    sub.add_argument("--micro-batches", type=COUNT, default=16)
    sub.add_argument("--layers", type=COUNT, default=8, help="in a stage; even")
    sub.add_argument("--rows", type=COUNT, default=512, help=f"of width {WIDTH} in a micro-batch")

    sub = command(real, "real compute on two pinned ranks: tokens/s, and time to a validation loss")
    sub.add_argument("--systems", nargs="+")
    sub.add_argument(
        "--data",
        type=Path,
        help="folder of prepare_data.py; default random tokens, and no time to a loss",
    )
    sub.add_argument("--blocks", type=COUNT, default=9)
    sub.add_argument("--width", type=COUNT, default=256)
    sub.add_argument("--sequences", type=COUNT, default=4, help="in a micro-batch")
    sub.add_argument("--micro-batches", type=COUNT, nargs="*", default=[1, 2, 4])
    sub.add_argument("--steps", type=COUNT, default=12, help="that count, in each repetition")
    sub.add_argument("--repeats", type=COUNT, default=3)
    sub.add_argument(
        "--target-loss",
        type=SIZE,
        help="measure the time to this validation loss, at the most micro-batches",
    )
    sub.add_argument("--max-steps", type=COUNT, default=600, help="on the way to the target")

    sub = command(heads, "variants of the auxiliary head in time and memory")
    sub.add_argument("--width", type=COUNT, default=768)
    sub.add_argument("--vocabulary", type=COUNT, default=50257)
    text = "in a sequence, one sequence a micro-batch"
    sub.add_argument("--tokens", type=COUNT, default=512, help=text)
    sub.add_argument("--repeats", type=COUNT, default=5)

    _add_gpu(command)


GPU_PARTS = ["tests", "whole", "stages", "heads", "engine", "study"]


def _add_gpu(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        gpu,
        "one device: times and MFU of each stage, what they predict for more devices, heads, and "
        "the engine beside a plain loop; goes on with the rows that --json holds; ends with 1 "
        "where tests failed",
    )
    sub.add_argument(
        "--models",
        nargs="+",
        default=["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-1b"],
        help="shipped configs",
    )
    sub.add_argument(
        "--parts",
        nargs="+",
        choices=GPU_PARTS,
        default=GPU_PARTS,
        help="what to do; heads and engine with the first model",
    )
    sub.add_argument("--stages", type=COUNT, nargs="+", default=[4, 8])
    sub.add_argument("--sequences", type=COUNT, default=16, help="in a micro-batch")
    sub.add_argument("--tokens", type=COUNT, default=1024, help="in a sequence")
    sub.add_argument("--micro-batches", type=COUNT, default=16, help="of a step, in the prediction")
    sub.add_argument("--accumulate", type=COUNT, default=4, help="micro-batches of a measured step")
    sub.add_argument("--kernel", default="compiled", help="head.kernel of the model's own readout")
    sub.add_argument("--repeats", type=COUNT, default=10)
    sub.add_argument(
        "--peak-tflops",
        type=SIZE,
        default=989.0,
        help="of the device in bf16, for the MFU; 989 is an H100 or H200",
    )
    sub.add_argument("--study-minutes", type=SIZE, default=8, help="for the runs of the study")
    sub.add_argument("--study-steps", type=SIZE, default=0.25, help="share of the preset's steps")
    sub.add_argument("--study-folder", type=Path, default=Path("out/study"))
    sub.add_argument("--no-compile", action="store_true", help="eager only")
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU, with a tiny model: shows that it runs, times mean nothing",
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.benchmark == "table":
        rows = report.load(args.files)
        print(report.markdown(rows))
        if args.png:
            pictures.draw_bars([row for row in rows if row["benchmark"] == "schedules"], args.png)
        return 0
    report.commit()  # before the code may change beside a long run
    rows = args.run(args)
    report.save(rows, args.json, args.benchmark)
    if rows:
        print(report.markdown(report.stamped(rows, args.benchmark)))
    if rows and getattr(args, "png", None):
        pictures.draw_bars(rows, args.png)
    return int(args.benchmark == "gpu" and has_failed_tests(rows, args))
