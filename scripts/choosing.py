"""Which scheme comes to equal loss first, by micro-batches per stage and link speed: the data of
the map on the page "choosing".

    python scripts/choosing.py

The time of a step is the simulator's, for a model cut over four stages by floating-point
operations, with full heads. How many more steps a scheme needs for a loss than backpropagation is
taken from the rows of the quality study (docs/quality.json, preset cpu, four segments).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ds_local.config import strict_json
from ds_local.config.files import local_parallel
from ds_local.config.strict import SECTION
from ds_local.outputs import write_file

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "docs" / "quality.json"
DATA = ROOT / "docs" / "results" / "choosing.json"
STAGES = 4
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # message / forward of a stage
MODELS = {
    "GPT-2 small": ("gpt2-small.json", 1024),
    "GPT-2 XL": ("gpt2-xl.json", 1024),
    "Llama 1B": ("llama-1b.json", 2048),
}
BACKPROP: dict[str, Any] = {"mode": "backprop"}
CHUNKS: dict[str, Any] = {"mode": "chunked", "window": 2}
# name -> (method of the study, scheme, split_backward, share of the steps in plain backpropagation)
SCHEMES: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "1F1B": ("backprop", BACKPROP, 0, 0.0),
    "backprop, split": ("backprop", BACKPROP, 2, 0.0),
    "chunked 2, split": ("chunked 2", CHUNKS, 2, 0.0),
    "chunked 2, split, tail 40 %": ("chunked 2, backprop tail 40 %", CHUNKS, 2, 0.4),
    "local": ("local", {"mode": "local"}, 0, 0.0),
    "local, split, tail 40 %": ("local, backprop tail 40 %", {"mode": "local"}, 2, 0.4),
}


def more_steps() -> dict[str, float]:
    """Steps of a scheme / steps of backpropagation to the same loss."""
    rows = {
        row["method"]: row
        for row in json.loads(QUALITY.read_text())
        if (row["preset"], row["segments"], row["step_factor"]) == ("cpu", STAGES, 1.0)
    }
    found = {}
    for name, (method, *_) in SCHEMES.items():
        row = rows[method]
        key = "M=8, c/F=0"
        found[name] = row["time_to_equal_loss"][key] / row["predicted_time_ratios"][key]
    return found


def step_time(
    model: Any, scheme: dict[str, Any], split: int, count: int, ratio: float, seq_len: int
) -> float:
    """Steady seconds a step, in floating-point operations."""
    from ds_local.model.flops import choose_parts, segment_times, unit_flops
    from ds_local.schedules.run_plan import RunPlan
    from ds_local.schedules.simulator import Costs, simulate

    given = {**scheme, "split_backward": split, "link": {"transfer": ratio}}
    section = local_parallel({SECTION: given})
    parts = choose_parts(model, section, STAGES, count, seq_len)
    unit = unit_flops(model, section.head, STAGES, seq_len)
    forward, input_grad, weight_grad, head = segment_times(unit, parts)
    message = ratio * unit.block / 3 * (parts[-1] - 2) / STAGES
    costs = Costs(forward, input_grad, weight_grad, head, message)
    return simulate(RunPlan(section, STAGES, count).schedules, costs).steady_period


def times_of(model: Any, seq_len: int, count: int, ratio: float) -> dict[str, float]:
    """Scheme -> time to equal loss, in parts of balanced 1F1B's."""
    factors, known = more_steps(), {}

    def time(scheme: dict[str, Any], split: int) -> float:
        key = (scheme["mode"], split)
        if key not in known:
            known[key] = step_time(model, scheme, split, count, ratio, seq_len)
        return known[key]

    yardstick = time(BACKPROP, 0)
    return {
        name: round(
            factors[name]
            * ((1 - tail) * time(scheme, split) + tail * time(BACKPROP, split))
            / yardstick,
            4,
        )
        for name, (_, scheme, split, tail) in SCHEMES.items()
    }


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    from ds_local.model.families import load_model_config

    maps = {}
    for name, (file, seq_len) in MODELS.items():
        model = load_model_config(str(ROOT / "configs" / file))
        maps[name] = {
            "seq_len": seq_len,
            "times": [
                [times_of(model, seq_len, count, ratio) for ratio in RATIOS]
                for count in MICRO_BATCHES
            ],
        }
    facts = {
        "stages": STAGES,
        "micro_batches": MICRO_BATCHES,
        "message_over_forward": RATIOS,
        "more_steps": {name: round(value, 4) for name, value in more_steps().items()},
        "models": maps,
    }
    write_file(DATA, strict_json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
