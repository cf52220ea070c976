"""The quality study: methods on equal tokens and the same data order, one table.

    python scripts/study.py run --methods backprop local "mixed 1/4" --segments 4 --minutes 9
    python scripts/study.py table

`run` trains what is not finished yet, all segments of a model in one process through the real
engine, and stops after the given minutes; call it again to go on. Several may run at once: each
takes runs that nobody else works on. A run that ends in backpropagation goes on from where the same
scheme without such a tail was, once that is finished: the two are the same until then. So are WSD
runs of different lengths until the shorter one decays. `table` adds what is finished to
docs/quality-runs.jsonl, one line a run, and writes docs/quality.json, the tables in docs/quality.md
(what is compared), docs/results/quality.md (all) and docs/quality-ratio.md (of the presets with
"ratio"), and the charts in docs/pictures. `methods` lists them. Paths are below the working
directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_local.cli.arguments import Parser, number, whole
from ds_local.config import strict_json
from ds_local.outputs import write_file
from ds_local.study.methods import METHODS
from ds_local.study.recipes import PRESETS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("command", choices=["run", "table", "methods"])
    add("--preset", choices=sorted(PRESETS), default="cpu")
    methods = list(METHODS)
    add("--methods", nargs="+", choices=sorted(METHODS), default=methods, metavar="METHOD")
    add("--segments", nargs="+", type=whole(1), default=[4])
    add("--seeds", nargs="+", type=whole(), default=[1])
    factor = number(above=True)
    add(
        "--lr-factors",
        nargs="+",
        type=factor,
        default=[1.0],
        help="factors on the preset's learning rate",
    )
    add(
        "--step-factors",
        nargs="+",
        type=factor,
        default=[1.0],
        help="factors on the preset's number of steps",
    )
    add(
        "--minutes",
        type=number(above=True),
        default=9.0,
        help="stop after so long; what is unfinished goes on next time",
    )
    add("--folder", default="out/study", help="where runs are kept")
    args = parser.parse_args(arguments)
    if args.command != "run":
        why = f"is for the runs of `run`, not for `{args.command}`; leave it out"
        of_runs = ["--preset", "--methods", "--segments", "--seeds", "--lr-factors"]
        parser.refuse(args, [*of_runs, "--step-factors", "--minutes"], why)
    if args.command == "methods":
        parser.refuse(args, ["--folder"], "is not looked at by `methods`; leave it out")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.command == "methods":
        print("\n".join(METHODS))
        return 0
    if args.command == "table":
        return table(Path(args.folder), Path("docs"))
    from ds_local.study.running import work

    return work(args)


def table(folder: Path, docs: Path) -> int:
    """Add the finished runs in a folder to those in `docs`, and write the pages."""
    from ds_local.study.picture import AT_THE_RATIO, SMALL, compared, curves_chart, gaps_chart
    from ds_local.study.results import all_runs
    from ds_local.study.summary import summary
    from ds_local.study.tables import markdown, ratio_markdown, short_markdown, write_between

    for place in (docs / "results", docs / "pictures"):
        place.mkdir(exist_ok=True, parents=True)
    results = all_runs(docs / "quality-runs.jsonl", folder)
    rows_of = {name: summary(name, [r for r in results if r["preset"] == name]) for name in PRESETS}
    rows_of = {name: rows for name, rows in rows_of.items() if rows}
    if not rows_of:
        print("no backprop run is finished yet; run it first", file=sys.stderr)
        return 1
    rows = [row for rows in rows_of.values() for row in rows]
    write_file(docs / "quality.json", strict_json.dumps(rows, indent=1) + "\n")
    at_ratio = {name: rows for name, rows in rows_of.items() if "ratio" in name}
    others = {name: rows for name, rows in rows_of.items() if name not in at_ratio}
    if at_ratio:
        write_between(docs / "quality-ratio.md", ratio_markdown(at_ratio))
        drawn = curves_chart(results, rows, AT_THE_RATIO)
        write_file(docs / "pictures" / "quality-ratio-curves.svg", drawn)
    if others:
        write_between(docs / "results" / "quality.md", markdown(others))
    if compared(rows, SMALL):
        write_between(docs / "quality.md", short_markdown(rows))
        write_file(docs / "pictures" / "quality.svg", gaps_chart(rows))
        write_file(docs / "pictures" / "quality-curves.svg", curves_chart(results, rows))
    print(short_markdown(rows))
    return 0
