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
from typing import Any, NamedTuple

from ds_local.config import strict_json
from ds_local.config.catalog import SCHEMES
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


class Row(NamedTuple):
    """What is compared: a scheme that has no tail, or a last part in backpropagation."""

    scheme: str  # in the table of schemes
    method: str  # of the study
    tail: float = 0.0  # share of the steps in `end`
    end: str = "backprop, split 2"

    @property
    def name(self) -> str:
        """Where people read it."""
        return self.scheme + (f", tail {100 * self.tail:.0f} %" if self.tail else "")


# key in the data -> row
ROWS = {
    "1F1B": Row("backprop", "backprop"),
    "backprop, split": Row("backprop, split 2", "backprop"),
    "chunked 2, split": Row("chunked 2, split 2", "chunked 2"),
    "chunked 2, split, tail 40 %": Row("chunked 2, split 2", "chunked 2, backprop tail 40 %", 0.4),
    "local": Row("local", "local"),
    "local, split, tail 40 %": Row("local", "local, backprop tail 40 %", 0.4),
}


def more_steps() -> dict[str, float]:
    """Steps of a scheme / steps of backpropagation to the same loss."""
    rows = {
        row["method"]: row
        for row in json.loads(QUALITY.read_text())
        if (row["preset"], row["segments"], row["step_factor"]) == ("cpu", STAGES, 1.0)
    }
    return {name: rows[of.method]["tokens_to_equal_loss"] for name, of in ROWS.items()}


def step_time(model: Any, scheme: str, count: int, ratio: float, seq_len: int) -> float:
    """Steady seconds a step, in floating-point operations."""
    from ds_local.model.flops import choose_parts, segment_times, unit_flops
    from ds_local.schedules.run_plan import RunPlan
    from ds_local.schedules.simulator import Costs, simulate

    given = {**SCHEMES[scheme].section, "link": {"transfer": ratio}}
    section = local_parallel({SECTION: given})
    parts = choose_parts(model, section, STAGES, count, seq_len)
    unit = unit_flops(model, section.head, STAGES, seq_len)
    forward, input_grad, weight_grad, head = segment_times(unit, parts)
    message = ratio * unit.block / 3 * (parts[-1] - 2) / STAGES
    costs = Costs(forward, input_grad, weight_grad, head, message)
    return simulate(RunPlan(section, STAGES, count).schedules, costs).steady_period


def times_of(model: Any, seq_len: int, count: int, ratio: float) -> dict[str, float]:
    """Scheme -> time to equal loss, in parts of balanced 1F1B's."""
    factors = more_steps()
    schemes = {name for row in ROWS.values() for name in (row.scheme, row.end)}
    time = {scheme: step_time(model, scheme, count, ratio, seq_len) for scheme in schemes}
    return {
        name: round(
            factors[name]
            * ((1 - row.tail) * time[row.scheme] + row.tail * time[row.end])
            / time["backprop"],
            4,
        )
        for name, row in ROWS.items()
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
