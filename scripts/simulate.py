"""Show what a schedule will do before running it: time line, idle share, live micro-batches, messages.

python scripts/simulate.py --stages 4 --micro-batches 8 --mode local --backprop-micro-batches 2
python scripts/simulate.py --stages 4 --micro-batches 8 --mode local --compare 1f1b zero_bubble --png schedules.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ds_local.order import make_schedule
from ds_local.peers import PEERS
from ds_local.routes import MODES, make_routes
from ds_local.schedule import Schedule
from ds_local.simulator import Costs, Timeline, chrome_trace, draw, simulate

WIDEST = 24  # stages and micro-batches of a grid that still fits on a screen


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", type=int, required=True)
    add("--micro-batches", type=int, required=True)
    add("--mode", required=True, choices=[*MODES, *PEERS], help="a row of the route table, or another pipeline's schedule")
    add("--window", type=int, help="of modes that take one")
    add("--combine", choices=["sum", "mean"], default="sum", help="of overlapping")
    add("--backprop-micro-batches", type=int, default=0, help="micro-batches of the step that run real backpropagation")
    add("--segments-per-stage", type=int, default=1)
    add("--compare", nargs="*", default=[], choices=[*MODES, *PEERS], help="schedules to show beside it")
    costs = parser.add_argument_group("times per segment and micro-batch, in any unit")
    costs.add_argument("--forward", type=float, default=1.0)
    costs.add_argument("--input-grad", type=float, default=1.0)
    costs.add_argument("--weight-grad", type=float, default=1.0)
    costs.add_argument("--head", type=float, default=0.0, help="auxiliary head with its loss and gradients")
    costs.add_argument("--link", type=float, default=0.0, help="time a message keeps a link busy")
    costs.add_argument("--profile", type=Path, help="measured times instead, from train.py --profile")
    costs.add_argument("--link-depth", type=int, help="messages a link holds; default no limit")
    output = parser.add_argument_group("output")
    output.add_argument("--json", help="file for the figures, - for the console instead of the grid")
    output.add_argument("--png", type=Path, help="picture of the time lines")
    output.add_argument("--trace", type=Path, help="Chrome/Perfetto trace of one step")
    return parser.parse_args(arguments)


def build(mode: str, args: argparse.Namespace, main: bool) -> list[Schedule]:
    """The schedules of `mode` until they repeat; mix, window and segments per stage of the command line are the main one's."""
    if mode in PEERS:
        return [PEERS[mode](args.stages, args.micro_batches)]
    segments = args.stages * args.segments_per_stage
    backprop = args.backprop_micro_batches if main else 0
    if backprop > args.micro_batches:
        raise ValueError(f"--backprop-micro-batches {backprop} exceeds --micro-batches {args.micro_batches}")
    window = args.window if main else None
    combine = args.combine if main else "sum"
    period = (window or 2) if mode == "shifted_chunked" else 1
    rows = [make_routes(mode, segments, window, combine, step=step) for step in range(period)]
    true = make_routes("backprop", segments)
    return [make_schedule([(true, backprop), (row, args.micro_batches - backprop)], args.stages) for row in rows]


def costs_for(schedule: Schedule, args: argparse.Namespace) -> Costs:
    """Peers that cut stages finer get finer costs: the same work on each stage, without heads."""
    if args.profile:
        return Costs.from_profile(args.profile)
    pieces = len(schedule.stage_of) / (schedule.num_stages * args.segments_per_stage)
    head = 0.0 if schedule.name.partition("(")[0] in PEERS else args.head
    return Costs(args.forward / pieces, args.input_grad / pieces, args.weight_grad / pieces, head, args.link)


def describe(timeline: Timeline) -> str:
    report = timeline.report()
    live = timeline.schedule.peak_live
    lines = [
        f"{report['schedule']}: one step alone {report['makespan']:g}, in a long run {report['steady_period']:g} a step, "
        f"idle {report['idle_share']:.1%} (alone {report['idle_share_alone']:.1%})",
        f"  live micro-batches {', '.join(map(str, live)) if len(live) <= WIDEST else f'at most {max(live)}'}; "
        f"messages a step: {report['messages']['activations']} activations, {report['messages']['gradients']} gradients",
    ]
    return "\n".join(lines)


def main() -> int:
    args = parse_arguments()
    try:
        schedules = [build(args.mode, args, True), *(build(mode, args, False) for mode in args.compare)]
        timelines = [simulate(steps, costs_for(steps[0], args), args.link_depth) for steps in schedules]
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    reports = [timeline.report() for timeline in timelines]
    result = reports[0] if not args.compare else reports
    if args.json == "-":
        print(json.dumps(result, indent=1))
    else:
        if max(args.stages * args.segments_per_stage, args.micro_batches) <= WIDEST:
            for schedule in [step for steps in schedules for step in steps]:
                print(schedule, end="\n\n")
        print("\n".join(describe(timeline) for timeline in timelines))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.png:
        draw(timelines, args.png)
    if args.trace:
        args.trace.write_text(json.dumps(chrome_trace(timelines[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
