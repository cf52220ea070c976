"""What the planner predicts beside what real engines measure.

python scripts/check_planner.py [--only sleep|scaling|real] [--json FILE]

First on stages whose compute is sleep: these show the bubbles of four devices on two cores;
engines, processes and messages are real. The same over stages and replicas, up to eight ranks, as
tokens per second of a device. Then on a model's real compute, two ranks pinned to a core
each: the first layout is profiled, and all are predicted from its profile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from ds_local.cli.arguments import output_file
from ds_local.cluster.candidates import Candidate, Cluster, Model, measured_model
from ds_local.cluster.pricing import Pricing
from ds_local.cluster.scheme_samples import section_for
from ds_local.config import strict_json
from ds_local.measure import emulated, network, sleeping
from ds_local.measure.ranks import Pool
from ds_local.measure.real import pinned
from ds_local.measure.real_systems import Job
from ds_local.measure.real_systems import config_of as real_config
from ds_local.model import families
from ds_local.model.flops import UnitCosts
from ds_local.outputs import write_file

# (scheme, stages, replicas, micro-batches per step, seconds of a head)
LAYOUTS = (
    ("local", 4, 1, 8, 0.0),
    ("backprop", 4, 1, 8, 0.0),
    ("interlocking 2", 4, 1, 8, 0.0),
    ("chunked 2", 4, 1, 8, 0.0),
    ("mixed 1/4", 4, 1, 8, 0.0),
    ("local", 4, 1, 8, 0.05),
    ("local", 2, 2, 8, 0.05),
    ("backprop", 2, 2, 4, 0.0),
)
# every number of stages and replicas that eight ranks allow, 8 micro-batches a replica
SCALING = [
    (scheme, stages, replicas, 8, 0.0)
    for scheme in ("backprop", "local")
    for stages in (2, 4, 8)
    for replicas in (1, 2, 4)
    if stages * replicas <= 8
]
REAL_LAYOUTS = (
    Candidate(2, 1, "local", "full", 4, 8),
    Candidate(2, 1, "backprop", "", 4, 8),
    Candidate(2, 1, "mixed 1/4", "full", 4, 8),
    Candidate(2, 1, "backprop", "", 4, 2),
    Candidate(2, 1, "local", "full", 8, 4),
    Candidate(1, 2, "data parallel", "", 4, 4),
)
MODEL = Path(__file__).resolve().parents[1] / "configs" / "gpt2-nano.json"
SECONDS = 0.1  # of a stage's forward, of each of its gradients


def predicted(layout: Candidate, times: sleeping.Times) -> float:
    """Seconds of a step."""
    model = Model(
        depth=layout.stages,
        hidden=times.floats,
        seq_len=1,
        costs=UnitCosts(times.useful, 0.0, [times.head]),
        config=None,
        block_params=2,
        embedding_params=0,
        readout_params=0,
        kept=0,
        itemsize=4,
    )
    cluster = Cluster(
        1, layout.stages * layout.replicas, tflops=1, memory_gib=1, link_gbps=1, intra_gbps=1
    )
    pricing = Pricing(model, cluster, layout.micro_batches * layout.replicas)
    return pricing.simulate(pricing.price(layout)).step_seconds


def measured(pool: Pool, layout: Candidate, times: sleeping.Times, steps: int) -> float:
    section = section_for(layout.scheme, layout.micro_batches)
    settings = times, layout.stages, layout.micro_batches, steps, network.Shape(), section
    results = pool.run(emulated.ds_local, layout.stages * layout.replicas, *settings, timeout=300)
    return emulated.period(results, warm=2)


def compare(
    pool: Pool, layouts: Any = LAYOUTS, seconds: float = SECONDS, steps: int = 6
) -> list[dict[str, Any]]:
    rows = []
    for scheme, stages, replicas, micro_batches, head in layouts:
        times = sleeping.Times(seconds, seconds, seconds, head)
        layout = Candidate(stages, replicas, scheme, "full" if head else "", 1, micro_batches)
        expected, found = predicted(layout, times), measured(pool, layout, times, steps)
        rows.append(_row(layout, expected, found, head=head))
    return rows


def _row(layout: Candidate, expected: float, found: float, **more: Any) -> dict[str, Any]:
    error = expected / found - 1
    print(
        f"{expected:>8.3f} s predicted {found:>8.3f} s measured {error:>+7.1%}  {layout}",
        flush=True,
    )
    return {"layout": str(layout), "predicted": expected, "measured": found, "error": error, **more}


def compare_scaling(pool: Pool, seconds: float = 2 * SECONDS) -> list[dict[str, Any]]:
    """As `compare`; a micro-batch counts as a token."""
    rows = compare(pool, SCALING, seconds, steps=5)
    for row, (scheme, stages, replicas, count, _) in zip(rows, SCALING, strict=True):
        each = count / stages
        row["predicted_device_rate"], row["measured_device_rate"] = (
            each / row[name] for name in ("predicted", "measured")
        )
        print(
            f"{scheme}, {stages} stages x {replicas} replicas: "
            f"{row['predicted_device_rate']:.3f} predicted, {row['measured_device_rate']:.3f} "
            f"measured a second and device, ratio "
            f"{row['measured_device_rate'] / row['predicted_device_rate']:.3f}",
            flush=True,
        )
    return rows


# --- real compute ---------------------------------------------------------------------------------


def profiled(layout: Candidate, folder: str, steps: int) -> float:
    """On a rank, pinned to a core: train with this layout, write its profile.json; seconds of a
    step.

    Measured over all steps together: what one stage loses by chance, another waits for.
    """
    import ds_local as package
    from ds_local.engine.recorder import Recorder
    from ds_local.training.profiling import write

    with pinned():
        job = Job(
            json.loads(MODEL.read_text()), None, 128, layout.micro_batch, layout.micro_batches
        )
        section = {**section_for(layout.scheme, layout.micro_batches), "num_stages": layout.stages}
        config = real_config(job) | {"local_parallel": section}
        module = package.causal_lm(job.model, layout.stages, config, job.tokens)
        engine = package.initialize(model=module, config=config)[0]
        data = job.batches(job.sequences, job.micro_batches)
        for _ in range(3):
            engine.train_batch(data)
        engine.recorder = Recorder(engine.device)
        start = time.perf_counter()
        for _ in range(steps):
            engine.train_batch(data)
        seconds = (time.perf_counter() - start) / steps
        write(engine, next(data) if engine.is_first_stage() else None, Path(folder), job.tokens)
        return seconds


def compare_real(
    pool: Pool, layouts: Any = REAL_LAYOUTS, repeats: int = 3, steps: int = 20
) -> list[dict[str, Any]]:
    """Layouts take turns, so that a busy moment of the machine meets all of them."""
    found: dict[Candidate, list[float]] = {layout: [] for layout in layouts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for layout in layouts:
                kept = Path(folder, "profile" if layout == layouts[0] else "other")
                kept.mkdir(exist_ok=True)
                found[layout].append(
                    max(pool.run(profiled, 2, layout, str(kept), steps, timeout=300))
                )
        profile = Path(folder, "profile", "profile.json")
        costs = json.loads(profile.read_text())["costs"]
        rate = 8e-9 * costs["activation_bytes"] / max(costs["link"])
        cluster = Cluster(1, 2, tflops=1, memory_gib=24, link_gbps=rate, intra_gbps=rate)
        model = measured_model(
            Model.of(families.load_model_config(str(MODEL)), itemsize=4), profile
        )
    rows = []
    for layout, times in found.items():
        pricing = Pricing(
            model,
            cluster,
            layout.micro_batch * layout.micro_batches * layout.replicas,
            zero_stage=0,
        )
        rows.append(
            _row(
                layout,
                pricing.simulate(pricing.price(layout)).step_seconds,
                median(times),
                repetitions=times,
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=output_file('"measured"'), help="file for the figures")
    parser.add_argument("--only", choices=["sleep", "scaling", "real"], help="one of them")
    args = parser.parse_args()
    pool, rows = Pool(), []
    try:
        for name, check in (
            ("sleep", compare),
            ("scaling", compare_scaling),
            ("real", compare_real),
        ):
            if args.only in (None, name):
                rows += check(pool)
    finally:
        pool.close()
    if args.json:
        write_file(args.json, strict_json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
