"""How often torch may compile one function anew."""

from __future__ import annotations

import torch

# torch's own is 8, after which a function runs as it is, and only the log says so. Each of shape,
# width, vocabulary, weights that learn or do not, and evaluation is a kind.
_LIMIT = 64


def allow_kinds() -> None:
    """Let one function be compiled for as many kinds of arguments as a run may have."""
    config = torch._dynamo.config
    # by the name that torch 2.6 knows, too
    config.cache_size_limit = max(_LIMIT, config.cache_size_limit)
