"""What came of a run, as a page: losses, waits, the schedule of a step, what to look at next.

python scripts/report.py runs/quickstart
python scripts/report.py runs/one runs/two --output compared.html
"""

from __future__ import annotations

from pathlib import Path

from ds_local.charts.pages import PAGE_MARK
from ds_local.cli.arguments import PAGE, Parser
from ds_local.outputs import check_file


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--output", type=PAGE, help="file to write; default report.html in the (first) run folder"
    )
    args = parser.parse_args(arguments)
    from ds_local.training import report
    from ds_local.training.run_record import RunRecord

    runs = [RunRecord(path) for path in args.runs]
    name = "report.html" if len(runs) == 1 else "compared.html"
    output = args.output or check_file(args.runs[0] / name, PAGE_MARK)
    report.write(runs, output)
    print(f"report: {output}")
    return 0
