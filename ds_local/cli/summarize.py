"""What came of a run: losses, idle shares, throughput, and a picture of the loss curves.

python scripts/summarize.py runs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

from ds_local.cli.arguments import Parser


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    args = parser.parse_args(arguments)
    from ds_local.checkpoints.metrics_file import METRICS_FILE, MetricsFile
    from ds_local.training.pictures import draw_losses, summary_table

    metrics = MetricsFile(args.run / METRICS_FILE)
    rows = metrics.read()
    if not rows:
        print(f"no metrics in {args.run}; is it a run folder?", file=sys.stderr)
        return 1
    print(summary_table(rows))  # also where a picture cannot be written
    draw_losses(metrics.path, args.run / "loss.png")
    print(f"loss curves: {args.run / 'loss.png'}; checkpoints: {args.run / 'checkpoints'}")
    return 0
