"""Can a model keep the documents of a sequence apart, told by positions that start again?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ds_local.errors import DataError, UnsupportedModel
from ds_local.model.blocks import context_of
from ds_local.model.families import num_blocks
from ds_local.model.state import HIDDEN

_FIRST, _TOKENS = 3, 8  # of the first document, of both


def check_keeps_documents_apart(config: PretrainedConfig) -> None:
    """Two documents in a sequence: no token of the second may see one of the first.

    Raises:
        UnsupportedModel: when a block of the model would let it.
    """
    positions_BT = torch.tensor([[*range(_FIRST), *range(_TOKENS - _FIRST)]])
    state = {HIDDEN: torch.zeros(1, _TOKENS, config.hidden_size), "position_ids": positions_BT}
    for index in range(num_blocks(config)):
        mask = _taken(config, index, state).get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 4 or _sees(mask[..., _FIRST:, :_FIRST]):
            raise UnsupportedModel(
                f"block {index} of {config.model_type} does not keep the documents of a sequence "
                "apart; prepare the data without --document-mask"
            )


def _taken(config: PretrainedConfig, index: int, state: dict[str, Tensor]) -> dict[str, Any]:
    """What a block takes besides the hidden state."""
    try:
        return context_of(config).call(state, index).kwargs
    except DataError:  # it takes no positions
        return {}


def _sees(mask: Tensor) -> bool:
    """Is anything not masked? Masks are true, or 0, where a token is seen."""
    return bool((mask if mask.dtype == torch.bool else mask == 0).any())
