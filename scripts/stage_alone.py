"""Kill single stages of a run, again and again, and say what it costs.

    python scripts/stage_alone.py --data data/python-stdlib --layout 4x1 --kills 60 \
        --json docs/results/stage-alone.json

Units that are jobs of their own, beside the same run undisturbed and, with --base-kills, beside one
job of all stages that its launcher starts again as a whole. Rows are added to the file; the page of
all of them is written beside it. With --kills 0 the page alone is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

from ds_local.measure.stage_alone import Layout, study
from ds_local.measure.stage_alone_page import page


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder written by scripts/prepare_data.py")
    add("--layout", default="4x1", help="stages x replicas")
    add("--kills", type=int, default=60)
    add("--base-kills", type=int, default=0, help="of ranks of the one job")
    add("--steps", type=int, default=2000)
    add("--saves", type=int, default=10, help="steps between checkpoints")
    add("--depth", type=int, default=4, help="of links, in messages")
    add("--seed", type=int, default=1)
    add("--port", type=int, default=29533, help="of the one job's launcher")
    add("--most-seconds", type=float, default=3600.0)
    add("--folder", type=Path, help="to keep the runs in; default: a temporary one")
    add("--json", type=Path, help="file to add the row to; default: the console")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no job is left
    if not args.kills:
        return write_page(args.json)
    layout = Layout(*map(int, args.layout.split("x")))
    with tempfile.TemporaryDirectory() as temporary:
        row = study(
            Path(args.folder or temporary).absolute(),
            args.data.absolute(),
            layout,
            args.kills,
            args.base_kills,
            steps=args.steps,
            saves=args.saves,
            depth=args.depth,
            seed=args.seed,
            port=args.port,
            most_seconds=args.most_seconds,
        )
    row |= {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }
    if args.json is None:
        print(json.dumps(row, indent=1))
    else:
        rows = json.loads(args.json.read_text()) if args.json.exists() else []
        lines = ",\n".join(map(json.dumps, [*rows, row]))
        args.json.write_text(f"[\n{lines}\n]\n")
        write_page(args.json)
    return 0


def write_page(figures: Path) -> int:
    """Beside its figures; scripts/pictures.py draws the first layout."""
    rows = json.loads(figures.read_text())
    figures.with_suffix(".md").write_text(page(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
