"""Losses over the frequent part of a vocabulary, the tokens that come most often: with one class
for all others, or with a sample of these.

N positions, D hidden, V vocabulary, C classes: the tokens that a loss is computed with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_local.errors import ConfigError
from ds_local.links.device import to_device
from ds_local.model.heads import IGNORE, by_slices
from ds_local.model.logits import LogitRule


class FrequentPart(nn.Module):
    """Token ids -> classes: 0 is the most frequent token, `size` the class of the rest.

    Which tokens these are is kept beside a head's weights, in its checkpoints too, so that a column
    of its readout means the same token for as long as it lives.

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


class SampledSoftmax(nn.Module):
    """Cross-entropy of a readout of all tokens, of which few are computed: the frequent ones, draws
    from the others that stand for all of these, and at each position the token that comes.

    This is the sampled softmax of Jean et al. 2015 (arXiv 1412.2007) with the frequent tokens kept
    out of the draw. The others are drawn with repetition, each as likely as it comes in the data,
    and count in the sum of exponentials for as many as they stand for. That sum has no bias, its
    logarithm a small one. No shape depends on the data, so a device never waits for its host.

    Args:
        counts_V: as in `FrequentPart`; not kept, since the readout's columns are the token ids.
        size: how many tokens are frequent.
        samples: how many draws there are, at each call anew from torch's CPU generator.
    """

    ranking_V: Tensor
    place_V: Tensor

    def __init__(self, counts_V: Tensor, size: int, samples: int) -> None:
        super().__init__()
        self.size, self.samples = size, samples
        ranking_V = _ranking(counts_V)
        self.register_buffer("ranking_V", ranking_V, persistent=False)
        self.register_buffer("place_V", ranking_V.argsort(), persistent=False)
        # stays on the CPU; tokens that never came are drawn too
        odds = counts_V[ranking_V[size:]].double() + 1
        self.odds = (odds / odds.sum()).float()

    def forward(
        self, hidden_ND: Tensor, readout: nn.Linear, targets_N: Tensor, rule: LogitRule
    ) -> Tensor:
        """The summed loss, a float32 scalar."""
        size, device = self.size, targets_N.device
        picks = torch.multinomial(self.odds, self.samples, replacement=True)
        log_weights = to_device(-(self.samples * self.odds[picks]).log(), device)
        drawn = self.ranking_V[size + to_device(picks, device)]
        ids_C = torch.cat([self.ranking_V[:size], drawn])
        known_N = targets_N.clamp(min=0)
        # one look-up, so that the gradient of the readout is made once
        rows = F.embedding(torch.cat([ids_C, known_N]), readout.weight)
        weight_CD, own_ND = rows.split([len(ids_C), len(known_N)])
        bias_C, own_N = None, torch.zeros(len(known_N), device=device)
        if readout.bias is not None:
            bias_C, own_N = readout.bias[ids_C], readout.bias[known_N]

        def loss(
            hidden: Tensor, targets: Tensor, classes: Tensor, own: Tensor, bias: Tensor
        ) -> Tensor:
            logits = rule(F.linear(hidden, weight_CD, bias_C)).float()
            itself = rule((hidden.float() * own.float()).sum(1) + bias)
            drawn_again = drawn == targets[:, None]
            return F.cross_entropy(
                torch.cat(
                    [
                        logits[:, :size],
                        (logits[:, size:] + log_weights).masked_fill(drawn_again, -math.inf),
                        itself.masked_fill(classes < size, -math.inf)[:, None],
                    ],
                    dim=1,
                ),
                classes,
                ignore_index=IGNORE,
                reduction="sum",
            )

        places_N = self.place_V[known_N]
        classes_N = torch.where(places_N < size, places_N, len(ids_C))
        classes_N = torch.where(targets_N == IGNORE, IGNORE, classes_N)
        return by_slices(loss, len(ids_C), hidden_ND, targets_N, classes_N, own_ND, own_N)


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
