"""The companion of a head: a second loss over all positions that needs no vocabulary.

A linear map of the head's hidden state foresees a shallow state of the next token (NITP, Zhang et
al. 2026, arXiv 2605.24956: next implicit token prediction). There the shallow state is that of an
early layer; here it is what the segment takes in at that token, which lies on the same stage, so
that nothing more travels. Of the first segment that is the embedding.

B sequences, T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_local.model.heads import IGNORE


class Companion(nn.Module):
    """Hidden states -> the weighted mean of 1 - cosine to the next token's shallow state.

    Args:
        foresee: D -> D, linear.
        weight: of this loss beside the head's own.
    """

    def __init__(self, foresee: nn.Linear, weight: float) -> None:
        super().__init__()
        self.foresee, self.weight = foresee, weight

    def forward(self, hidden_BTD: Tensor, shallow_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """A float32 scalar. The positions that count are those of the head's own loss: the next
        token has a label. `shallow_BTD` takes no gradient."""
        foreseen = self.foresee(hidden_BTD[:, :-1]).float()
        shallow = shallow_BTD[:, 1:].detach().float()
        distance_BT = 1 - torch.cosine_similarity(foreseen, shallow, dim=-1)
        counts_BT = labels_BT[:, 1:] != IGNORE
        total = torch.where(counts_BT, distance_BT, 0.0).sum()
        return self.weight * total / counts_BT.sum().clamp(min=1)
