"""Recipes of the studies: the model, its data, its optimizer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

PACKAGES = "installed packages"  # a source: see `texts.package_text`
TRIAL = "tiny"  # to try the command; `table` leaves it out
BF16 = {"bf16": {"enabled": True}}


class Preset(NamedTuple):
    """A recipe in which depth matters."""

    model: dict[str, Any]
    source: str  # of prepare_data.py, or PACKAGES
    tokenizer: str
    steps: int
    sequences: int  # per step
    micro_batches: int  # per step, unless a method needs another number
    learning_rate: float
    precision: dict[str, Any]

    @property
    def step_tokens(self) -> int:
        return self.sequences * int(self.model["n_positions"])


def gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> dict[str, Any]:
    """GPT-2's shape, its weights drawn as widely as GPT-2 small's 0.02 is for a width of 768.

    With 0.02 at a width of 64 every method learns slowly, and those that add two kinds of gradient
    suffer most.
    """
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "vocab_size": vocabulary,
        "n_positions": positions,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": round(0.02 * math.sqrt(768 / width), 3),
        # GPT-2's function as one operation of torch's, not eight
        "activation_function": "gelu_pytorch_tanh",
    }


def _on_cpu(heads: int, vocabulary: int, positions: int) -> dict[str, Any]:
    return gpt2(8, 64, heads, vocabulary, positions)


STDLIB = "python-stdlib"
PRESETS = {
    "cpu": Preset(_on_cpu(4, 512, 64), STDLIB, "sentencepiece:512", 3000, 32, 4, 4e-3, {}),
    "cpu-large-batch": Preset(
        _on_cpu(4, 512, 64), STDLIB, "sentencepiece:512", 800, 128, 4, 8e-3, {}
    ),
    "cpu-gpt2-ratio": Preset(
        _on_cpu(2, 4096, 128), PACKAGES, "sentencepiece:4096", 1600, 64, 8, 8e-3, {}
    ),
    "cpu-ratio-32": Preset(
        _on_cpu(2, 2048, 128), PACKAGES, "sentencepiece:2048", 1600, 64, 8, 8e-3, {}
    ),
    TRIAL: Preset(gpt2(4, 32, 4, 512, 32), STDLIB, "sentencepiece:512", 20, 8, 4, 4e-3, {}),
    "gpu-10m": Preset(
        gpt2(12, 256, 4, 4096, 256), STDLIB, "sentencepiece:4096", 4000, 64, 8, 2e-3, BF16
    ),
    "gpu-125m": Preset(
        gpt2(12, 768, 12, 16384, 512), STDLIB, "sentencepiece:16384", 4000, 128, 8, 6e-4, BF16
    ),
}
