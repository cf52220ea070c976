"""Losses of language models: the shifted cross-entropy, and the auxiliary head that gives an early segment a loss.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100  # label of a position that does not count, as in Hugging Face models


def lm_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each next token; the loss that Hugging Face's causal models compute.

    Args:
        labels_BT: the token ids themselves (int64); the shift by one happens here. `IGNORE` marks positions to leave out.

    Returns:
        A float32 scalar; 0 when no position counts.
    """
    logits_NV = logits_BTV[:, :-1].flatten(0, 1).float()
    targets_N = labels_BT[:, 1:].flatten()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum") / count_targets(labels_BT).clamp(min=1)


def count_targets(labels_BT: Tensor) -> Tensor:
    """How many positions of `labels_BT` count in `lm_loss` (int64 scalar)."""
    return (labels_BT[:, 1:] != IGNORE).sum()


class AuxiliaryHead(nn.Module):
    """Norm and linear readout: hidden state of a segment -> its own language-model loss."""

    def __init__(self, norm: nn.Module, readout: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.readout = readout

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Next-token logits, shape [B, T, V]."""
        return self.readout(self.norm(hidden_BTD))

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """The scalar loss of `lm_loss`."""
        return lm_loss(self.logits(hidden_BTD), labels_BT)
