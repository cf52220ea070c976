"""What the files and folders of checkpoints are called."""

from __future__ import annotations

import re

# DeepSpeed's
LAYER_FILE = "layer_{:02d}-model_states.pt"  # of a layer's weights
STAGE_FILE = "mp_rank_{:02d}_model_states.pt"  # of a stage: counters, and what is not sharded
SHARD_FILE = "zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt"  # of a replica and a stage
BF16_SHARD_FILE = f"bf16_{SHARD_FILE}"
# ours
HEAD_FILE = "head_{:02d}-model_states.pt"  # of a segment's auxiliary head
AVERAGE_FILE = "ema_layer_{:02d}.pt"  # running averages of a layer's weights
AVERAGE_HEAD_FILE = "ema_head_after_{:02d}.pt"  # of the head above so many layers

_TAG = "global_step"


def tag_of(step: int) -> str:
    """The tag of a checkpoint that nobody has named."""
    return f"{_TAG}{step}"


def step_of(tag: str) -> int | None:
    """The step of such a tag, None for one that somebody has chosen."""
    match = re.fullmatch(rf"{_TAG}(\d+)", tag)
    return None if match is None else int(match[1])
