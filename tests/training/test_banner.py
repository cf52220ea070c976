"""What a run says it is about to do, to the letter."""

from argparse import Namespace

import pytest

from ds_local.config.files import local_parallel
from ds_local.model import families
from ds_local.schedules.run_plan import RunPlan
from ds_local.training.banner import Length, PhaseForecast, banner, forecast

FACTS = {
    "model": {"model_type": "gpt2"},
    "weights": None,
    "machine": {"device": "cpu"},
    "config": {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002}},
        "scheduler": {"type": "WSD", "params": {"total_num_steps": 300}},
        "bf16": {"enabled": True},
    },
    "layout": {
        "stages": 2,
        "replicas": 1,
        "parameters": [1000, 2000],
        "head_parameters": [500, 0],
    },
}


def test_every_line():
    phases = [
        PhaseForecast(0, "local: a segment learns from its own loss alone", [0.5, 0.0]),
        PhaseForecast(240, "backprop: the last loss trains everything", None),
    ]
    args = Namespace(eval_every=50, eval_sequences=1024)
    assert banner(FACTS, phases, Length(300, 32, 128, 9600), 0, 1.0, args).splitlines() == [
        "  model         gpt2, 3,000 parameters and 500 in auxiliary heads, bf16, fresh weights",
        "  stages        2 x 1 replica on cpu: 1,000 + head 500; 2,000",
        "  scheme        local: a segment learns from its own loss alone",
        "  idle          25% predicted (50%, 0%), if links cost nothing",
        "  scheme        from step 240 on, backprop: the last loss trains everything",
        "  steps         300 of 32 x 128 tokens: 1,228,800 tokens, 1 epochs of 9,600 sequences",
        "  learning rate AdamW, 0.002, gradients clipped at 1; WSD: total_num_steps 300",
        "  validation    at step 0, every 50 steps and at the end, on 1,024 sequences",
    ]


def test_what_the_run_does_not_come_to_is_not_told():
    phases = [PhaseForecast(0, "local", None), PhaseForecast(240, "backprop", None)]
    args = Namespace(eval_every=0, eval_sequences=None)
    told = banner(FACTS, phases, Length(240, 32, 128, 9600), 0, 0.0, args)
    assert "backprop" not in told
    assert "WSD: total_num_steps 300 (but the run has 240 steps)" in told


def test_a_run_that_goes_on_says_from_where():
    args = Namespace(eval_every=0, eval_sequences=None)
    told = banner(FACTS, [], Length(300, 32, 128, 9600), 50, 0.5, args)
    assert "bf16, as it was at step 50\n" in told


def test_many_stages_in_one_line():
    layout = {
        "stages": 9,
        "replicas": 2,
        "parameters": list(range(10, 19)),
        "head_parameters": [1] * 8 + [0],
    }
    told = banner(
        {**FACTS, "layout": layout, "weights": "gpt2", "config": {"optimizer": {"type": "Adam"}}},
        [PhaseForecast(0, "local", [0.1] * 8 + [0.55])],
        Length(10, 1, 8, 100),
        0,
        0.0,
        Namespace(eval_every=0, eval_sequences=None),
    )
    assert "9 x 2 replicas on cpu: 11 to 18 parameters each, heads included" in told
    assert "15% predicted (10% to 55%)" in told
    assert "fp32, from the weights of gpt2" in told
    assert "Adam, the same in every step" in told
    assert "only at the end, on all sequences" in told


@pytest.mark.parametrize(
    ("section", "words", "idle"),
    [
        # 1F1B of two equal stages and four micro-batches: 2 of 10 slots are empty, on both
        ({"mode": "backprop"}, "backprop: the last loss trains everything", [0.2, 0.2]),
        (
            {"mode": "chunked", "window": 2},
            "chunked(2): backpropagation inside 2 segments, one loss for each such chunk",
            [0.2, 0.2],
        ),
    ],
)
def test_the_schemes_in_words_and_what_they_wait(section, words, idle):
    config = families.load_model_config(
        {"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 2, "vocab_size": 64}
    )
    plan = RunPlan.of(local_parallel({"local_parallel": section}), 2, 4)
    (found,) = forecast(plan, config, [0, 3, 6], 128)
    assert (found.first_step, found.words) == (0, words)
    assert found.idle == pytest.approx(idle, abs=0.01)  # so small a readout costs next to nothing


def test_phases_are_forecast_one_by_one():
    config = families.load_model_config("configs/gpt2-nano.json")
    section = {"phases": [{"mode": "local", "until_step": 6}, {"mode": "backprop"}]}
    plan = RunPlan.of(local_parallel({"local_parallel": section}), 2, 4)
    local, backprop = forecast(plan, config, [0, 3, families.num_blocks(config) + 2], 128)
    assert (local.first_step, backprop.first_step) == (0, 6)
    assert min(local.idle) == 0 < min(backprop.idle)


def test_epochs_count_the_sequences_that_steps_of_another_size_had():
    length = Length(steps=13, per_step=8, seq_len=10, sequences=100)
    assert str(length) == "13 of 8 x 10 tokens: 1,040 tokens, 1.04 epochs of 100 sequences"
    resumed = length.resumed(step=10, seen=40, epochs=1)
    assert resumed.steps == 18
    assert str(resumed) == "18 of 8 x 10 tokens: 1,040 tokens, 1.04 epochs of 100 sequences"
    assert length.resumed(10, 40, None).steps == 13
    assert str(length.resumed(10, 40, None)).startswith("13 of 8 x 10 tokens: 640 tokens, 0.64 ")
    assert length.resumed(50, 200, 1).steps == 50  # there is nothing left to do
    assert length.resumed(5, 40, 1).steps == 13  # as from the start
