"""What the planner predicts beside what real engines measure, on stages whose compute is sleep.

python scripts/check_planner.py [--json FILE]

Sleeping stages show the bubbles of four devices on two cores; the engines, processes and messages are real.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import emulated, network

from ds_local.flops import UnitCosts
from ds_local.planner import Cluster, Layout, Model, Pricing, section_for
from ds_local.ranks import Pool

# (row, stages, replicas, micro-batches per step, seconds of a head)
LAYOUTS = (
    ("local", 4, 1, 8, 0.0), ("backprop (1F1B)", 4, 1, 8, 0.0), ("interlocking 2", 4, 1, 8, 0.0), ("chunked 2", 4, 1, 8, 0.0),
    ("mixed 1/4", 4, 1, 8, 0.0), ("local", 4, 1, 8, 0.05), ("local", 2, 2, 8, 0.05), ("backprop (1F1B)", 2, 2, 4, 0.0),
)  # fmt: skip
SECONDS = 0.1  # of a stage's forward, of each of its gradients


def predicted(layout: Layout, times: emulated.Times) -> float:
    """Seconds of a step."""
    model = Model(
        depth=layout.stages, hidden=times.floats, seq_len=1, costs=UnitCosts(times.useful, 0.0, [times.head]), config=None,
        block_params=2, embedding_params=0, readout_params=0, kept=0, itemsize=4,
    )  # fmt: skip
    cluster = Cluster(1, layout.stages * layout.replicas, tflops=1, memory_gib=1, link_gbps=1, intra_gbps=1)
    pricing = Pricing(model, cluster, layout.micro_batches * layout.replicas)
    return pricing.simulate(pricing.price(layout)).step_seconds


def measured(pool: Any, layout: Layout, times: emulated.Times, steps: int) -> float:
    section = section_for(layout.row, layout.micro_batches)
    settings = times, layout.stages, layout.micro_batches, steps, network.Shape(), section
    results = pool.run(emulated.ds_local, layout.stages * layout.replicas, *settings, timeout=300)
    return emulated.period(results, warm=2)


def compare(pool: Any, layouts: Any = LAYOUTS, seconds: float = SECONDS, steps: int = 6) -> list[dict[str, Any]]:
    rows = []
    for row, stages, replicas, micro_batches, head in layouts:
        times = emulated.Times(seconds, seconds, seconds, head)
        layout = Layout(stages, replicas, row, "full" if head else "", 1, micro_batches)
        expected, found = predicted(layout, times), measured(pool, layout, times, steps)
        rows.append({
            "layout": str(layout), "head": head, "predicted": expected, "measured": found, "error": expected / found - 1,
        })  # fmt: skip
        print(f"{expected:>8.3f} s predicted {found:>8.3f} s measured {rows[-1]['error']:>+7.1%}  {layout}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    pool = Pool()
    try:
        rows = compare(pool, steps=args.steps)
    finally:
        pool.close()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
