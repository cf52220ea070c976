"""How much longer heads take than their floating-point operations say, a full head's time being 1.

Measured by `python scripts/benchmark.py heads --repeats 3`: width 768, vocabulary 50,257, 512
tokens, one thread of a CPU (docs/benchmarks.md#heads). On an H200 with compiled losses
(docs/results/gpu.md) heads on few positions took 1.5 to 3.6 times what their operations say, a
bottleneck of 128 6.5 times.
"""

from __future__ import annotations

from typing import Any

from ds_local.config.catalog import Section, head_of
from ds_local.config.sections import HeadConfig

# options of "head", "vocabulary" as a share -> time by operations
MEASURED: list[tuple[Section, float]] = [
    ({"readout": "shared"}, 1.01),
    ({"readout": "shared", "adapter": True}, 1.03),
    ({"readout": "shared", "temperature": True}, 1.04),
    ({"token_fraction": 0.25}, 1.36),
    ({"token_fraction": 0.125}, 1.89),
    ({"token_fraction": 0.0625}, 2.86),
    ({"rank": 128}, 1.48),
    ({"rank": 192}, 1.30),
    ({"vocabulary": 0.125}, 0.99),
    ({"vocabulary": 0.125, "token_fraction": 0.25}, 1.24),
    ({"vocabulary": 0.125, "rank": 128}, 1.31),
    ({"token_fraction": 0.125, "companion": 1.0}, 1.79),
    ({"readout": "shared", "token_fraction": 0.125, "companion": 1.0}, 1.20),
    ({"rank": 128, "token_fraction": 0.125}, 2.15),
    ({"rank": 128, "token_fraction": 0.25}, 1.58),
    ({"readout": "shared", "token_fraction": 0.25}, 1.11),
    ({"readout": "shared", "token_fraction": 0.125}, 1.23),
    ({"readout": "shared", "adapter": True, "token_fraction": 0.125}, 1.25),
    ({"blocks": 1}, 0.98),
    ({"blocks": 1, "token_fraction": 0.125}, 1.33),
    (
        {"blocks": 1, "blocks_from": "next_tracked", "readout": "shared", "token_fraction": 0.125},
        1.08,
    ),
]
_WORK = {
    *("blocks", "blocks_from", "readout", "rank", "adapter", "temperature"),
    *("token_fraction", "vocabulary", "rare_rank"),
}


def time_over_flops(head: HeadConfig, vocab_size: int) -> float:
    """Of a model with so many tokens; 1 for a head that was not measured."""
    wanted = _work(head)
    known = ((HeadConfig(**head_of(given, vocab_size)), factor) for given, factor in MEASURED)
    return next((factor for one, factor in known if _work(one) == wanted), 1.0)


def _work(head: HeadConfig) -> dict[str, Any]:
    """The options that time depends on."""
    return head.model_dump(include=_WORK) | {"companion": bool(head.companion)}
