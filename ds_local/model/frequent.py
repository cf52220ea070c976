"""The frequent part of a vocabulary: the tokens that come most often, and one class for the rest.

Which tokens these are is kept beside a head's weights, in its checkpoints too, so that a column of
its readout means the same token for as long as it lives. N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.errors import ConfigError
from ds_local.model.heads import IGNORE


class FrequentPart(nn.Module):
    """Token ids -> classes: 0 is the most frequent token, `size` the class of the rest.

    Args:
        counts_V: how often each token comes; of equals the lower id is the more frequent one.
        size: how many tokens have a class of their own.
    """

    class_of: Tensor

    def __init__(self, counts_V: Tensor, size: int) -> None:
        super().__init__()
        class_of = torch.full_like(counts_V, size, dtype=torch.int64)
        ranking = counts_V.argsort(descending=True, stable=True)
        class_of[ranking[:size]] = torch.arange(size)
        self.register_buffer("class_of", class_of)

    def forward(self, targets_N: Tensor) -> Tensor:
        """Classes of tokens; `IGNORE` stays what it is."""
        return torch.where(targets_N == IGNORE, targets_N, self.class_of[targets_N.clamp(min=0)])


def checked_counts(counts: Sequence[int] | Tensor | Any, vocab_size: int) -> Tensor:
    """How often each token of a model comes, int64 [V]: as given, and 0 for ids above them.

    Raises:
        ConfigError: when they are no such numbers.
    """
    try:
        found = torch.as_tensor(counts)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty(())
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.dim() != 1 or not len(found) or not whole or found.min() < 0 or not found.any():
        raise ConfigError(
            "token_counts must be a folder of scripts/prepare_data.py or a number for each token "
            "id, how often it comes in the training data, as torch.bincount gives them; got "
            f"{_in_short(counts)}"
        )
    if len(found) > vocab_size:
        raise ConfigError(
            f"token_counts has {len(found)} entries, but the model's vocabulary has {vocab_size} "
            "tokens; count with the tokenizer of this model"
        )
    return nn.functional.pad(found.cpu().long(), (0, vocab_size - len(found)))


def _in_short(value: Any) -> str:
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
    text = "" if shape else f" {value!r}"
    return f"{type(value).__name__}{shape}{text[:60]}"
