"""Random numbers that depend on what they are for, never on what was drawn before.

Weights are keyed by layer, dropout by (step, micro-batch, replica, segment). So neither the number of ranks, nor their
speed, nor a restart changes any of them, and a checkpoint needs no generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(*key: int | str) -> int:
    """A 63-bit seed from a key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Inside, torch's generators are seeded by the key; afterwards they go on as if nothing had happened."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_for(*key))
        yield
