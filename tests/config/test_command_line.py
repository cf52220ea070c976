"""What train.py's command line says instead of the config file."""

import json
from argparse import Namespace

import pytest

from ds_local.config.command_line import overridden_section, read_settings
from ds_local.errors import ConfigError

NOTHING = {
    "mode": None,
    "window": None,
    "backprop_micro_batches": None,
    "backprop_from": None,
    "num_stages": None,
    "segments_per_stage": None,
    "seed": None,
}
FILE = {"phases": [{"mode": "local", "until_step": 3}, {"mode": "backprop"}], "seed": 5}
TOLD = {
    "nothing": ({}, FILE),
    "a mode": ({"mode": "chunked", "window": 2}, {"mode": "chunked", "window": 2, "seed": 5}),
    "a mix": (
        {"mode": "local", "backprop_micro_batches": 1},
        {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}], "seed": 5},
    ),
    "a tail": (
        {"mode": "local", "backprop_from": 9, "seed": 7},
        {"phases": [{"mode": "local", "until_step": 9}, {"mode": "backprop"}], "seed": 7},
    ),
    "sizes": (
        {"num_stages": 2, "segments_per_stage": 3},
        FILE | {"num_stages": 2, "segments_per_stage": 3},
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_section(name):
    told, wanted = TOLD[name]
    assert overridden_section(FILE, Namespace(**NOTHING | told)) == wanted


CHUNKS = {"mode": "chunked", "window": 4}
FEW = {"mode": "backprop", "micro_batches": 2}
MEAN = {"mode": "overlapping", "combine": "mean", "window": 3}
AHEAD = {"mode": "backprop", "run_ahead": "auto", "predict_weights": True}


@pytest.mark.parametrize(
    ("section", "told", "wanted"),
    [
        ({}, {"backprop_micro_batches": 2}, {"mix": [FEW, {"mode": "local"}]}),
        (CHUNKS, {"backprop_micro_batches": 2}, {"mix": [FEW, CHUNKS]}),
        (CHUNKS, {"backprop_micro_batches": 0}, CHUNKS),
        (CHUNKS, {"mode": "chunked", "window": 2}, {"mode": "chunked", "window": 2}),
        (CHUNKS, {"mode": "local"}, {"mode": "local"}),
        (MEAN, {"mode": "overlapping"}, MEAN),
        (AHEAD, {"mode": "backprop"}, AHEAD),
        (AHEAD, {"mode": "local"}, {"mode": "local"}),
        (
            {"mix": [{**FEW, "micro_batches": 1}, CHUNKS], "correction": 1.0},
            {"backprop_micro_batches": 2},
            {"mix": [FEW, CHUNKS], "correction": 1.0},
        ),
        (
            AHEAD,
            {"mode": "backprop", "backprop_from": 9},
            {"phases": [{**AHEAD, "until_step": 9}, {"mode": "backprop"}]},
        ),
    ],
)
def test_an_option_changes_what_it_names(section, told, wanted):
    assert overridden_section(section, Namespace(**NOTHING | told)) == wanted


@pytest.mark.parametrize("mix", [None, [FEW, {**CHUNKS, "micro_batches": 1}, {"mode": "local"}]])
def test_a_number_of_micro_batches_needs_to_know_the_rest(mix):
    section = FILE if mix is None else {"mix": mix}
    with pytest.raises(ConfigError, match=r"does not say what the other .*; give --mode"):
        overridden_section(section, Namespace(**NOTHING | {"backprop_micro_batches": 1}))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"window": 2}, "--window"),
        ({"backprop_from": 9}, "--backprop-from"),
        ({"backprop_micro_batches": 5}, "--backprop-micro-batches 5 exceeds"),
    ],
)
def test_what_cannot_be(tmp_path, told, words):
    path = tmp_path / "ds_config.json"
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
    path.write_text(json.dumps(batch | {"optimizer": {"type": "Adam"}, "local_parallel": FILE}))
    with pytest.raises(ConfigError, match=words):
        read_settings(Namespace(deepspeed_config=path, **NOTHING | told))
