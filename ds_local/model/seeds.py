"""Random numbers that depend on what they are for, never on what was drawn before.

Weights are keyed by layer, dropout by (step, micro-batch, replica, segment). So neither the number
of ranks, nor their speed, nor a restart changes any of them, and a checkpoint needs no generator
state.
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
    """Inside, torch's generators are seeded by the key; afterwards they go on as if nothing had
    happened.

    Works on the generators themselves: `torch.manual_seed` also looks at devices that are not in
    use, which costs a millisecond, and this runs in every forward pass.
    """
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    states = [generator.get_state() for generator in generators]
    seed = seed_for(*key)
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
