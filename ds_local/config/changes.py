"""What a start may change of the run that it goes on with, by the name that allows it."""

from __future__ import annotations

CHANGES = {
    "model": "the model's config, where its weights still fit",
    "data": "other sequences",
    "tokenizer": "another tokenizer",
    "seed": "another order of the data, other dropout",
    "batch": "sequences of a micro-batch, micro-batches of a step, replicas",
    "scheme": "the scheme, heads, codecs",
    "layout": "stages, cut, precision, kind of optimizer: its state starts afresh",
    "scheduler": "another kind of learning-rate scheduler: it starts afresh",
}
