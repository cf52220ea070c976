"""What travels from block to block: a hidden state, alone or with a mask and positions."""

from __future__ import annotations

from torch import Tensor

State = Tensor | dict[str, Tensor]  # hidden [B, T, D], or a dict with it
HIDDEN = "hidden_states"  # its name in a dict
GIVEN = ("attention_mask", "position_ids")  # the names of what may be beside it


def hidden_of(state: State) -> Tensor:
    return state[HIDDEN] if isinstance(state, dict) else state
