"""Show what a schedule will do before running it: time line, idle share, live micro-batches,
messages.

    python scripts/simulate.py --stages 4 --micro-batches 8 --mode local --backprop-micro-batches 2
    python scripts/simulate.py --stages 4 --micro-batches 8 --mode local \\
        --compare 1f1b zero_bubble --html schedules.html --png schedules.png
    python scripts/simulate.py --stages 4 --micro-batches 8 --mode local --compare 1f1b \\
        --model configs/gpt2-nano.json
    python scripts/simulate.py --stages 4 --micro-batches 8 --mode backprop --csv schedule.csv
    python scripts/simulate.py --stages 4 --micro-batches 8 --mode backprop --schedule schedule.csv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ds_local.charts.pages import timeline_page
from ds_local.cli.arguments import SHEET_MARK
from ds_local.cli.simulate_options import check_options, parser_of
from ds_local.config import strict_json
from ds_local.config.catalog import name_of
from ds_local.config.files import local_parallel
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError
from ds_local.outputs import check_file, new_file, write_file
from ds_local.schedules.drawing import band_of, chrome_trace, draw
from ds_local.schedules.peers import PEERS, TITLES
from ds_local.schedules.replay import grid_of
from ds_local.schedules.routes import MODES
from ds_local.schedules.run_plan import RunPlan, check_size
from ds_local.schedules.schedule import Schedule
from ds_local.schedules.sheets import csv_of
from ds_local.schedules.simulator import Costs, Timeline, several_steps, simulate

WIDEST = 24  # stages and micro-batches of a grid that still fits on a screen


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    args = parser.parse_args(arguments)
    check_options(parser, args)
    return args


def section_for(
    mode: str, args: argparse.Namespace, is_main: bool, **options: Any
) -> LocalParallelConfig:
    """The "local_parallel" section of `mode`; the other options of the command line are the main
    one's."""
    scheme: dict[str, Any] = {"mode": mode}
    if is_main:
        scheme |= {"combine": args.combine} | (
            {"window": args.window} if args.window is not None else {}
        )
        count = args.backprop_micro_batches
        if count != "auto" and count > args.micro_batches:
            raise ConfigError(
                f"--backprop-micro-batches {count} exceeds --micro-batches {args.micro_batches}"
            )
        if count:
            scheme = {"mix": [{"mode": "backprop", "micro_batches": count}, scheme]}
        if args.correction:
            scheme["correction"] = args.correction
        if args.run_ahead:
            scheme["run_ahead"] = args.run_ahead
        scheme["split_backward"] = args.split_backward
        if args.schedule:
            scheme["schedule"] = args.schedule
    section = {
        **scheme,
        "segments_per_stage": args.segments_per_stage,
        "link": {"transfer": args.transfer},
        **options,
    }
    return local_parallel({SECTION: section})


def build(mode: str, args: argparse.Namespace, is_main: bool) -> list[Schedule]:
    """The schedules of `mode` until they repeat."""
    if mode in PEERS:
        check_size(LocalParallelConfig(), args.stages, args.micro_batches)
        return [PEERS[mode](args.stages, args.micro_batches)]
    plan = RunPlan(section_for(mode, args, is_main), args.stages, args.micro_batches)
    for note in plan.notes:
        print(note, file=sys.stderr)
    return plan.schedules


def costs_for(schedule: Schedule, args: argparse.Namespace) -> Costs:
    """Peers that cut stages finer get finer costs: the same work on each stage, without heads."""
    if args.profile:
        return measured_costs(args.profile, schedule)
    pieces = len(schedule.stage_of) / (schedule.num_stages * args.segments_per_stage)
    head = 0.0 if schedule.name.partition("(")[0] in PEERS else args.head
    return Costs(
        args.forward / pieces, args.input_grad / pieces, args.weight_grad / pieces, head, args.link
    )


def measured_costs(profile: Path, schedule: Schedule) -> Costs:
    """Those of a profile.

    Raises:
        ConfigError: when it is of other segments, or has no heads where the schedule needs them.
    """
    costs = Costs.from_profile(profile)
    needed, last = len(schedule.stage_of), len(schedule.stage_of) - 1
    count = len(costs.forward) if isinstance(costs.forward, list) else needed
    if count != needed:
        raise ConfigError(
            f"{profile} is of {count} segments, but {schedule.name} has {needed}; give as many by "
            "--stages and --segments-per-stage, or profile a run with as many"
        )
    trained = {segment for routes in schedule.rows for segment in routes.weights} - {last}
    if missing := sorted(segment for segment in trained if not costs.of("head", segment)):
        raise ConfigError(
            f"{profile} was measured without the auxiliary heads of segments "
            f"{', '.join(map(str, missing))}, which {schedule.name} trains; profile a run with "
            "them, or give --model in place of it"
        )
    return costs


def of_model(
    schedule: Schedule, mode: str, args: argparse.Namespace, is_main: bool
) -> tuple[Costs, list[float]]:
    """Costs in floating-point operations of a block's forward, and the auxiliary share of each
    stage."""
    from ds_local.config.files import load_config
    from ds_local.model import families
    from ds_local.model.flops import auxiliary_shares, choose_parts, segment_times, unit_flops

    config = families.load_model_config(args.model)
    given = local_parallel(load_config(args.deepspeed_config) if args.deepspeed_config else {})
    options = {"head": given.head.model_dump(), "partition": given.partition}
    section = section_for(mode if mode in MODES else "backprop", args, is_main, **options)
    seq_len = args.seq_len or families.num_positions(config)
    num_segments = len(schedule.stage_of)
    parts = choose_parts(config, section, num_segments, args.micro_batches, seq_len)
    unit = unit_flops(config, section.head, num_segments, seq_len)
    forward, input_grad, weight_grad, head = (
        [cost * 3 / unit.block for cost in part] for part in segment_times(unit, parts)
    )
    return Costs(forward, input_grad, weight_grad, head, args.link), auxiliary_shares(
        config, section, schedule, parts, seq_len
    )


def title_of(schedule: Schedule, mode: str, args: argparse.Namespace, is_main: bool) -> str:
    if mode in PEERS:
        return TITLES[mode]
    section = section_for(mode, args, is_main)
    if section.mix is None:
        return name_of(section.model_dump())
    return schedule.name + (f", split {args.split_backward}" if args.split_backward else "")


def describe(timeline: Timeline) -> str:
    report = timeline.report()
    live = timeline.schedule.peak_live
    lines = [
        f"{report['schedule']}: one step alone {report['makespan']:g}, in a long run "
        f"{report['steady_period']:g} a step, idle {report['idle_share']:.1%} (alone "
        f"{report['idle_share_alone']:.1%})",
        "  live micro-batches "
        f"{', '.join(map(str, live)) if len(live) <= WIDEST else f'at most {max(live)}'}; "
        f"messages a step: {report['messages']['activations']} activations, "
        f"{report['messages']['gradients']} gradients",
    ]
    if timeline.schedule.leads:
        lines.append(
            f"  delay of gradients in steps, by stage: {_listed(report['delay_steps'])}; "
            f"copies of earlier weights: {_listed(report['weight_copies'])}"
        )
    return "\n".join(lines)


def _listed(figures: list[float]) -> str:
    if len(figures) > WIDEST:
        return f"at most {max(figures):.3g}"
    return ", ".join(f"{figure:.3g}" for figure in figures)


def _write_order(path: Path, schedules: list[Schedule]) -> None:
    """FILE.csv; FILE-1.csv, FILE-2.csv, ... where there are several."""
    for place, schedule in enumerate(schedules, 1):
        one = path.with_stem(f"{path.stem}-{place}") if len(schedules) > 1 else path
        write_file(check_file(one, SHEET_MARK), csv_of(schedule))


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    modes = [(args.mode, True), *((mode, False) for mode in args.compare)]
    schedules = [build(mode, args, is_main) for mode, is_main in modes]
    modelled = (
        [
            of_model(steps[0], mode, args, is_main)
            for steps, (mode, is_main) in zip(schedules, modes, strict=True)
        ]
        if args.model
        else []
    )
    costs = [costs for costs, _ in modelled] or [costs_for(steps[0], args) for steps in schedules]
    timelines = [
        simulate(steps, cost, args.link_depth) for steps, cost in zip(schedules, costs, strict=True)
    ]
    reports = [timeline.report() for timeline in timelines]
    for report, (_, shares) in zip(reports, modelled, strict=False):
        report["auxiliary_flops"] = shares
    result = reports[0] if not args.compare else reports
    if str(args.json) == "-":
        print(strict_json.dumps(result, indent=1))
    else:
        if max(args.stages * args.segments_per_stage, args.micro_batches) <= WIDEST:
            for schedule in [step for steps in schedules for step in steps]:
                print(grid_of(schedule), end="\n\n")
        for timeline, report in zip(timelines, reports, strict=True):
            print(describe(timeline))
            if args.model:
                print(
                    "  auxiliary share of the work, by stage: "
                    + ", ".join(f"{s:.1%}" for s in report["auxiliary_flops"])
                )
    if args.json and str(args.json) != "-":
        write_file(args.json, strict_json.dumps(result, indent=1) + "\n")
    if args.csv:
        _write_order(args.csv, schedules[0])
    if args.png or args.html:
        bands = [
            band_of(
                timeline,
                several_steps(steps, cost, args.steps, args.link_depth),
                title_of(timeline.schedule, mode, args, is_main),
            )
            for timeline, steps, cost, (mode, is_main) in zip(
                timelines, schedules, costs, modes, strict=True
            )
        ]
    if args.png:
        with new_file(args.png) as picture:
            draw(bands, picture)
    if args.html:
        many = f"{args.steps} steps" if args.steps > 1 else "one step"
        title = f"{args.stages} stages, {args.micro_batches} micro-batches"
        lead = f"{many} of each schedule on one time axis, simulated; numbers are micro-batches"
        write_file(args.html, timeline_page(title, lead, bands))
    if args.trace:
        write_file(args.trace, strict_json.dumps(chrome_trace(timelines[0])))
    return 0
