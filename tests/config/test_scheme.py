"""Schemes: rows, mixes, and what goes with them."""

import pytest

from ds_local.config.files import local_parallel
from ds_local.config.scheme import MixEntry, Phase, Row, Scheme
from ds_local.errors import ConfigError
from ds_local.schedules.run_plan import RunPlan


def test_auto_is_refused_where_it_means_nothing():
    auto, local = {"mode": "backprop", "micro_batches": "auto"}, {"mode": "local"}
    for mix in (
        [auto],
        [local, auto],
        [auto, {**local, "micro_batches": 2}],
        [auto, auto],
        [auto, local, {**local, "micro_batches": 1}],
    ):
        with pytest.raises(
            ConfigError, match=r'"auto" is for the first of two|at most one entry without'
        ):
            local_parallel({"local_parallel": {"mix": mix}})
    with pytest.raises(ConfigError, match="8 segments and 4 micro-batches not one can be hidden"):
        RunPlan(local_parallel({"local_parallel": {"mix": [auto, local]}}), 8, 4).schedule_at(0)


def refused(words, **section):
    with pytest.raises(ConfigError, match=words):
        local_parallel({"local_parallel": section})


def test_chunks_that_shift_repeat_after_as_many_steps():
    assert [Row(mode="shifted_chunked", window=w).period for w in (None, 3)] == [2, 3]
    assert Row(mode="chunked", window=3).period == 1
    mix = [MixEntry(mode="shifted_chunked", window=w, micro_batches=w) for w in (2, 3)]
    assert Scheme(mix=mix).period == 6


def test_a_mix_replaces_a_row():
    entry = {"mode": "local"}
    refused("give either mix or mode, window, not both", mode="chunked", window=2, mix=[entry])
    refused("mix needs at least one entry", mix=[])
    refused("at most one entry without micro_batches", mix=[entry, entry])


def test_a_correction_is_between_two_rows():
    refused("between the two entries of a mix, got 0: leave it out", correction=0.5)
    three = [{"micro_batches": 1}, {"micro_batches": 1}, {}]
    refused("between the two entries of a mix, got 3", mix=three, correction=0.5)


def test_running_ahead_is_for_gradients_that_cross_segments():
    refused("with mode 'local' none does: leave it out", run_ahead=1)
    refused("those of mode 'shifted_chunked' move", mode="shifted_chunked", run_ahead=1)
    auto = [{"mode": "backprop", "micro_batches": "auto"}, {}]
    refused('give a number instead of "auto"', mix=auto, run_ahead=1)
    for option in ({"predict_weights": True}, {"delay_discount": 0.5}):
        refused(f"{next(iter(option))} corrects what run_ahead delays", mode="backprop", **option)
    assert Scheme(mode="backprop", run_ahead="auto", predict_weights=True).run_ahead == "auto"


def test_a_phase_ends_at_a_step():
    assert Phase(until_step=3, mode="backprop").until_step == 3
    refused("phases.0.until_step", phases=[{"until_step": 0}, {}])
