"""What ranks of nearly every test would do anew, done once where they are forked from: imports, and
the start check of the models."""

import gc

import jobs
import pytest  # noqa: F401

from ds_local.model.families import load_model_config

for model in jobs.MODELS.values():
    load_model_config(model)
gc.collect()
gc.freeze()
