from dataclasses import replace

import pytest
from reference import GPT2

from ds_local.cluster.candidates import HEADS, PLANNED, TAILS, Candidate, Cluster, Model
from ds_local.cluster.pricing import Pricing, expected_memory
from ds_local.cluster.scheme_samples import delay_of, sample_of, schedule_for
from ds_local.config.sections import HeadConfig
from ds_local.model.families import load_model_config
from ds_local.model.flops import UnitCosts, stage_flops, unit_flops
from ds_local.model.head_times import time_over_flops
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, StepTimer, simulate


def even(stages=4, seconds=3.0, kept=0):
    """A model of one block a stage; a block's forward and gradients take a second each, per
    sequence."""
    return Model(stages, 8, 10, UnitCosts(seconds, 0.0, [0.0]), None, 100, 0, 0, kept, 4)


@pytest.mark.parametrize("scheme", PLANNED)
def test_the_quick_timer_agrees_with_the_simulator(scheme):
    stages = 1 if scheme == "data parallel" else 4
    costs = Costs(
        [1.0, 1.3, 0.8, 1.1][:stages],
        1.2,
        0.9,
        [0.3, 0.1, 0.2, 0.5][:stages],
        0.7,
        [2.0, 1.0, 0.0, 1.0][:stages],
    )
    schedule = schedule_for(scheme, stages, 8)
    assert StepTimer(schedule).steady_period(costs) == pytest.approx(
        simulate(schedule, costs).steady_period
    )


@pytest.mark.parametrize("scheme", [scheme for scheme in PLANNED if scheme != "data parallel"])
def test_no_layout_is_faster_than_its_bound(scheme):
    cluster = Cluster(1, 4, 1, 80, 1e-6, 1e-6)
    pricing = Pricing(even(), cluster, 40)
    price = pricing.price(Candidate(4, 1, scheme, "", 1, 40))
    simulated = pricing.simulate(price)
    assert simulated.step_seconds >= price.step_seconds * (1 - 1e-9)
    costs = Costs(1.0, 1.0, 1.0, 0.0, link=8 * 10 * (8 * 4 + 4) / 1e3)
    exact = simulate(schedule_for(scheme, 4, 40), costs).steady_period
    assert simulated.step_seconds == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("scheme", TAILS)
def test_a_tail_is_the_mean_of_both_parts(scheme):
    first, end, share = TAILS[scheme]
    pricing = Pricing(even(), Cluster(1, 4, 1, 80, 1e-6, 1e-6), 8)
    prices = [
        pricing.simulate(pricing.price(Candidate(4, 1, part, "full", 1, 8)))
        for part in (scheme, first, end)
    ]
    seconds, begins, ends = (price.step_seconds for price in prices)
    assert seconds == pytest.approx((1 - share) * begins + share * ends)
    assert prices[0].memory == max(price.memory for price in prices[1:])
    bound = pricing.price(Candidate(4, 1, scheme, "full", 1, 8))
    assert bound.step_seconds <= seconds * (1 + 1e-9)


def test_heads_stay_in_memory_through_a_tail():
    """Chunks of two have a head on the second of four stages, which the tail's stages carry on."""
    model = Model.of(load_model_config({"model_type": "gpt2"}), 1024)
    pricing = Pricing(model, Cluster(1, 4, 1, 1e9, 1, 1, reserve_gib=0), 8, zero_stage=0)
    tail, plain = (
        pricing._parts(Candidate(4, 1, scheme, "full", 1, 8))[-1][1]
        for scheme in ("chunked 2, split 2, tail 40 %", "backprop, split 2")
    )
    assert tail._head_params(1) == (768 * 50257, 0)
    assert plain._head_params(1) == tail._head_params(0) == (0, 0)


def test_the_memory_of_a_run_is_that_of_its_fullest_phase():
    model = load_model_config({"model_type": "gpt2"})

    def expected(scheme):
        sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 16}
        return expected_memory(model, {**sizes, "local_parallel": scheme}, 4, 1)

    local, backprop = {"mode": "local"}, {"mode": "backprop"}
    phases = expected({"phases": [{**local, "until_step": 60}, backprop]})
    assert phases > expected(backprop)  # the heads stay
    assert phases > expected(local)


def test_run_ahead_by_hand():
    """No stage waits; for that a stage keeps a second copy of its 100 parameters."""
    cluster = Cluster(1, 4, 1, 80, 1e9, 1e9)
    pricing = Pricing(even(), cluster, 4)
    ahead, plain = (
        pricing.simulate(pricing.price(Candidate(4, 1, scheme, "", 1, 4)))
        for scheme in ("chunked 2, run ahead", "chunked 2")
    )
    assert ahead.step_seconds == pytest.approx(12)
    assert plain.step_seconds == pytest.approx(15)
    assert ahead.memory - plain.memory == pytest.approx(400)


def test_predicted_weights_cost_one_more_copy():
    """Stages of 100 parameters keep 2, 1, 1 and 0 earlier copies; the weights before the last
    update are kept where there are any."""
    schemes = ("backprop, run ahead", "backprop, run ahead, predicted")
    assert [sample_of(scheme, 4, 4).copies for scheme in schemes] == [[2, 1, 1, 0], [3, 2, 2, 0]]
    assert [delay_of(schemes[1], 4, count) for count in (1, 4, 16)] == [3, 0.75, 0.1875]
    assert delay_of("chunked 2, run ahead", 8, 4) == 0.25
    assert delay_of("backprop", 4, 4) == 0


def test_local_training_by_hand():
    cluster = Cluster(
        1, 4, 1, 80, 1, 8 * 360 / 1e9 / 2
    )  # a message of 10 tokens x (8 x 4 + 4) bytes takes 2 seconds
    pricing = Pricing(even(), cluster, 8)
    local, true = (
        pricing.simulate(pricing.price(Candidate(4, 1, scheme, "", 1, 8)))
        for scheme in ("local", "backprop")
    )
    assert local.step_seconds == pytest.approx(24)  # the links keep up
    assert local.idle_share == pytest.approx(0)
    assert true.step_seconds > 24 + 3 * (3 + 4)  # fill and drain, and both ways over three links
    assert local.bytes_per_edge == 8 * 360


@pytest.mark.parametrize("mode", ["backprop", "chunked"])
def test_a_run_is_taken_for_the_row_that_splits_as_it_does(mode):
    """More micro-batches are alive on every stage; deferred, their blocks are kept whole even where
    they were recomputed."""
    model = load_model_config({"model_type": "gpt2"})
    expected = {}
    for recompute in (0, 1):
        for split in (0, 1, 2):
            config = {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 16,
                "pipeline": {"activation_checkpoint_interval": recompute},
                "local_parallel": {"mode": mode, "split_backward": split},
            }
            expected[recompute, split] = expected_memory(model, config, 4, 1)
    assert expected[0, 0] < expected[0, 2]
    assert expected[1, 0] < expected[1, 2]
    if mode == "backprop":
        assert expected[1, 0] < 0.8 * expected[1, 1] < expected[1, 2]
    else:  # only the widest split has a scheme of its own
        assert expected[0, 0] == expected[0, 1]


def test_a_mix_is_taken_for_the_one_of_a_quarter():
    model = load_model_config({"model_type": "gpt2"})
    mix = [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "local_parallel": {"mix": mix},
    }
    roomy = Pricing(Model.of(model, itemsize=4), Cluster(1, 4, 1, 1e9, 1, 1), 32, zero_stage=0)
    quarter, half = (
        roomy.price(Candidate(4, 1, scheme, "full", 4, 8, "across_nodes")).memory
        for scheme in ("mixed 1/4", "mixed 1/2")
    )
    assert expected_memory(model, config, 4, 1) == quarter < half


def test_gradients_that_are_only_handed_through_are_extra_work_split_or_not():
    """Interlocking's middle segments pass one gradient on for each that they train on: a quarter of
    their work."""
    unit, parts = UnitCosts(3.0, 0.0, [0.0] * 3), [0, 2, 3, 4, 6]  # a block a segment
    rows = [(make_routes("interlocking", 4, 2), 2)]
    for split in (0, 1):
        costs = stage_flops(make_schedule(rows, 4, 0.0, split), unit, parts)
        assert [cost["auxiliary"] / (cost["useful"] + cost["auxiliary"]) for cost in costs] == [
            0,
            0.25,
            0.25,
            0,
        ]


@pytest.mark.parametrize("known", [[], [0.0], [0.0, 0.0, 0.0]], ids=len)
def test_heads_that_no_run_has_measured_are_not_free(known):
    """A profile of backpropagation: a head takes the blocks that its operations are worth."""
    config = load_model_config(GPT2)
    sized = Model.of(config)
    flops = unit_flops(config, HeadConfig(), 4, sized.seq_len)
    pricing = Pricing(replace(sized, costs=UnitCosts(2.0, 1.0, known)), Cluster(1, 4, *[1] * 4), 8)
    head = 2.0 * flops.heads[0] / flops.block
    assert pricing.unit("full", 4) == UnitCosts(2.0, 1.0, [head] * 3)
    shared = head * 2 / 3 * time_over_flops(HeadConfig(**HEADS["shared"]), config.vocab_size)
    assert pricing.unit("shared", 4).heads == [pytest.approx(shared)] * 3
    price = pricing.price(Candidate(4, 1, "local", "full", 1, 8))
    assert price.parts["auxiliary heads"] == pytest.approx(8 * head * 3 / 4)
    measured = Pricing(replace(sized, costs=UnitCosts(2.0, 1.0, [0.5])), pricing.cluster, 8)
    assert measured.unit("full", 4).heads == [0.5] * 3


def test_heads_take_longer_than_their_operations_say_where_that_was_measured():
    config = load_model_config(GPT2)
    pricing = Pricing(Model.of(config), Cluster(1, 4, *[1] * 4), 8)
    full, few = (pricing.unit(heads, 4).heads[0] for heads in ("full", "1/8 of the tokens"))
    assert few / full == pytest.approx(time_over_flops(HeadConfig(token_fraction=0.125), 9) / 8)
    assert few > 1.5 * full / 8


def test_memory_goes_by_the_sequences_of_the_data():
    """The model's longest sequence is 128 times as long, and activations grow with it."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    model = load_model_config(
        {"model_type": "llama", "max_position_embeddings": 131072, "vocab_size": 4096, **sizes}
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "local_parallel": {"mode": "local"},
    }
    longest, short = (expected_memory(model, config, 4, 1, length) for length in (None, 1024))
    assert longest > 8 * short
    assert longest == expected_memory(model, config, 4, 1, 131072)


def test_memory_goes_by_the_heads_of_the_config():
    model = load_model_config({"model_type": "gpt2"})

    def memory(**head):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 4,
            "local_parallel": {"mode": "local", "head": head},
        }
        return expected_memory(model, config, 4, 1)

    assert memory() > memory(vocabulary=8191) > memory(vocabulary=8191, rank=16)
    assert memory(readout="shared", companion=0.5) > memory(readout="shared")
