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

# name -> (options of "head", see `catalog.head_of`; time by operations)
MEASURED: dict[str, tuple[Section, float]] = {
    "shared readout": ({"readout": "shared"}, 1.01),
    "shared readout, adapter": ({"readout": "shared", "adapter": True}, 1.03),
    "shared readout, temperature": ({"readout": "shared", "temperature": True}, 1.04),
    "1/4 of the tokens": ({"token_fraction": 0.25}, 1.36),
    "1/8 of the tokens": ({"token_fraction": 0.125}, 1.89),
    "1/16 of the tokens": ({"token_fraction": 0.0625}, 2.86),
    "rank 128": ({"rank": 128}, 1.48),
    "rank 192": ({"rank": 192}, 1.30),
    "1/8 of the vocabulary": ({"vocabulary": 1 / 8}, 0.99),
    "1/8 of the vocabulary, 1/4 of the tokens": (
        {"vocabulary": 1 / 8, "token_fraction": 0.25},
        1.24,
    ),
    "1/8 of the vocabulary, rank 128": ({"vocabulary": 1 / 8, "rank": 128}, 1.31),
    "1/16 of the vocabulary, 1/32 drawn": ({"vocabulary": 1 / 16, "rare_samples": 1 / 32}, 1.79),
    "1/32 of the vocabulary, 1/32 drawn": ({"vocabulary": 1 / 32, "rare_samples": 1 / 32}, 2.33),
    "shared readout, 1/16 of the vocabulary, 1/32 drawn": (
        {
            "readout": "shared",
            "temperature": True,
            "vocabulary": 1 / 16,
            "rare_samples": 1 / 32,
        },
        1.40,
    ),
    "1/8 of the tokens, companion": ({"token_fraction": 0.125, "companion": 1.0}, 1.79),
    "shared readout, 1/8 of the tokens, companion": (
        {"readout": "shared", "token_fraction": 0.125, "companion": 1.0},
        1.20,
    ),
    "rank 128, 1/8 of the tokens": ({"rank": 128, "token_fraction": 0.125}, 2.15),
    "rank 128, 1/4 of the tokens": ({"rank": 128, "token_fraction": 0.25}, 1.58),
    "shared readout, 1/4 of the tokens": ({"readout": "shared", "token_fraction": 0.25}, 1.11),
    "shared readout, 1/8 of the tokens": ({"readout": "shared", "token_fraction": 0.125}, 1.23),
    "shared readout, adapter, 1/8 of the tokens": (
        {"readout": "shared", "adapter": True, "token_fraction": 0.125},
        1.25,
    ),
    "a private block": ({"blocks": 1}, 0.98),
    "a private block, 1/8 of the tokens": ({"blocks": 1, "token_fraction": 0.125}, 1.33),
    "a tracked block, shared readout, 1/8": (
        {
            "blocks": 1,
            "blocks_from": "next_tracked",
            "readout": "shared",
            "token_fraction": 0.125,
        },
        1.08,
    ),
}
_WORK = {
    *("blocks", "blocks_from", "readout", "rank", "adapter", "temperature"),
    *("token_fraction", "vocabulary", "rare_samples"),
}


def time_over_flops(head: HeadConfig, vocab_size: int) -> float:
    """Of a model with so many tokens; 1 for a head that was not measured."""
    wanted = _work(head)
    for options, factor in MEASURED.values():
        if _work(HeadConfig(**head_of(options, vocab_size))) == wanted:
            return factor
    return 1.0


def _work(head: HeadConfig) -> dict[str, Any]:
    """The options that time depends on."""
    return head.model_dump(include=_WORK) | {"companion": bool(head.companion)}
