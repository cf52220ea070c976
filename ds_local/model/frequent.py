"""The frequent part of a vocabulary: the tokens that come most often, and one class for the rest,
the rare ones, which a cheaper readout may tell apart.

Which tokens these are is kept beside a head's weights, in its checkpoints too, so that a column of
its readout means the same token for as long as it lives. N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.config.sections import RARE_SHARE
from ds_local.errors import ConfigError
from ds_local.links.device import to_device
from ds_local.model.heads import IGNORE, readout_loss
from ds_local.model.logits import LogitRule


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
        class_of[_ranking(counts_V)[:size]] = torch.arange(size)
        self.register_buffer("class_of", class_of)

    def forward(self, targets_N: Tensor) -> Tensor:
        """Classes of tokens; `IGNORE` stays what it is."""
        return torch.where(targets_N == IGNORE, targets_N, self.class_of[targets_N.clamp(min=0)])


class RareReadout(nn.Module):
    """The second part of the loss over all tokens: which of the rare ones it is, where it is one.

    This is adaptive softmax (Grave et al. 2017, arXiv 1609.04309) with two clusters, and with a
    fixed number of positions in training, so that no shape depends on the data: a device never has
    to wait until its host has read how many there are.

    Args:
        counts_V: as in `FrequentPart`.
        down: D -> a smaller width, linear.
        readout: that width -> the rare tokens, which are the last in the order of counts.
    """

    number_of: Tensor

    def __init__(self, counts_V: Tensor, down: nn.Linear, readout: nn.Linear) -> None:
        super().__init__()
        self.down, self.readout = down, readout
        count = readout.out_features
        number_of = torch.full_like(counts_V, IGNORE, dtype=torch.int64)
        number_of[_ranking(counts_V)[-count:]] = torch.arange(count)
        self.register_buffer("number_of", number_of)

    def forward(self, hidden_ND: Tensor, targets_N: Tensor, kernel: str, rule: LogitRule) -> Tensor:
        """The summed cross-entropy over the positions with a rare token (float32 scalar); in
        training an unbiased estimate of it, where these are more than `RARE_SHARE` of all."""
        numbers_N = torch.where(
            targets_N == IGNORE, targets_N, self.number_of[targets_N.clamp(min=0)]
        )
        if not self.training:
            return readout_loss(self.down(hidden_ND), self.readout, numbers_N, kernel, rule)
        rare_N = numbers_N != IGNORE
        room = math.ceil(RARE_SHARE * len(numbers_N))
        # drawn on the CPU: the same positions on any device; those with a rare token come first
        drawn_N = to_device(torch.rand(len(numbers_N)), rare_N.device) + rare_N
        chosen = drawn_N.topk(room).indices
        factor = rare_N.sum() / rare_N[chosen].sum().clamp(min=1)
        hidden = self.down(hidden_ND[chosen])
        return factor * readout_loss(hidden, self.readout, numbers_N[chosen], kernel, rule)


def _ranking(counts_V: Tensor) -> Tensor:
    """Token ids, the most frequent one first; of equals the lower id."""
    return counts_V.argsort(descending=True, stable=True)


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
