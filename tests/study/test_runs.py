"""Runs of the quality study: their names, their tails, their configs."""

import pytest
from study_runs import run_of

from ds_local.config.files import load_config, local_parallel
from ds_local.study.methods import METHODS, TAILS
from ds_local.study.recipes import PRESETS, TRIAL
from ds_local.study.runs import CHECKPOINTS, ds_config


def test_a_tail_leaves_the_run_without_one():
    tail = run_of("mixed 1/4, tail 20 %", seed=3)
    assert tail.trunk == run_of("mixed 1/4", seed=3)
    assert tail.switch(0.2) == 2400
    assert run_of("mixed 1/4").trunk is None
    assert (
        run_of("mixed 1/4, tail 20 %, 1/8 of the tokens").trunk is None
    )  # nobody runs it without a tail


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != TRIAL])
def test_every_tail_begins_at_a_checkpoint(preset):
    run = run_of("local", preset=preset)
    every = run.steps // CHECKPOINTS
    assert [run.switch(tail) % every for tail in TAILS] == [0] * len(TAILS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_config_that_can_be_trained_with(method):
    needed = METHODS[method].micro_batches or 1
    fitting = [name for name, preset in PRESETS.items() if not preset.sequences % needed]
    assert fitting
    for preset in fitting:
        run = run_of(method, preset=preset)
        config = load_config(ds_config(run))
        micro_batches = config["gradient_accumulation_steps"]
        sequences = config["train_micro_batch_size_per_gpu"] * micro_batches
        assert sequences == PRESETS[preset].sequences
        section = local_parallel(config)
        assert section.segments_per_stage == run.segments
        changes = METHODS[method].tail or METHODS[method].dropped_by
        assert bool(section.phases) == bool(changes or "one backprop step" in method)


def test_runs_of_different_lengths_warm_up_alike_and_decay_over_the_last_fifth():
    short, long = (
        ds_config(run_of("local, WSD", step_factor=factor))["scheduler"]["params"]
        for factor in (0.5, 2.0)
    )
    assert short == {"total_num_steps": 1500, "warmup_num_steps": 50, "decay_num_steps": 300}
    assert long == {"total_num_steps": 6000, "warmup_num_steps": 50, "decay_num_steps": 1200}
    cosine = ds_config(run_of("local", step_factor=2.0))["scheduler"]["params"]
    assert cosine == {"total_num_steps": 6000, "warmup_num_steps": 200, "cos_min_ratio": 0.1}


def test_a_name_is_a_folder_and_says_what_differs():
    assert run_of("mixed 1/4, tail 20 %").name == "mixed_1-4_tail_20-K4-seed1-lr2"
    longer = run_of("backprop, WSD", step_factor=0.25, seed=3)
    assert longer.name == "backprop_WSD-K4-seed3-lr2-steps0.25"
