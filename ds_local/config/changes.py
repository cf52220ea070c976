"""What a start may change of the run that it goes on with, by the name that allows it."""

from __future__ import annotations

CHANGES = {
    "model": "the model's config, where its weights still fit",
    "data": "other sequences",
    "tokenizer": "another tokenizer",
    "seed": "another order of the data, other dropout",
    "batch": "sequences of a step; with a mix, micro-batches too",
    "scheme": "the scheme, heads, codecs",
    "optimizer": "another kind of optimizer: its state starts afresh",
    "scheduler": "another kind of learning-rate scheduler: it starts afresh",
}

# names of one release ago -> today's
RENAMED = {"layout": "optimizer"}
