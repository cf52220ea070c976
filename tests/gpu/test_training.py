"""Two ranks on one device train as one process on a CPU does."""

import jobs
import on_device
import pytest
import torch
from families import MIXTRAL
from ranks import run_ranks
from reference import Reference, batch, table_of
from torch.testing import assert_close

STEPS = 8
CLOSE = {"rtol": 5e-3, "atol": 5e-4}  # after eight steps of AdamW; other kernels, other rounding

ROWS = [
    ("local", {"mode": "local"}),
    ("backprop", {"mode": "backprop"}),
    ("chunked", {"mode": "chunked", "window": 2, "split_backward": 1}),
    ("overlapping", {"mode": "overlapping", "window": 2}),
    ("interlocking", {"mode": "interlocking", "window": 2}),
]


def train(section, ranks=2, steps=STEPS, **settings):
    section = {**section, "segments_per_stage": 4 // ranks}
    return run_ranks(jobs.train, ranks, section, ranks, steps, timeout=200, **settings)


def losses_of(results):
    reports = results[0]["reports"]
    return [loss for report in reports for loss in report.values() if loss is not None]


@pytest.mark.parametrize(("mode", "section"), ROWS, ids=[mode for mode, _ in ROWS])
def test_two_ranks_on_a_device_equal_one_process_on_a_cpu(mode, section):
    results = train(section)
    reference = Reference("gpt2", results[0]["parts"])
    table = table_of(mode, 4)
    for step in range(STEPS):
        losses = reference.step([batch(step, m, 0) for m in range(4)], [table] * 4)
        found = results[0]["reports"][step]
        assert {s for s, loss in found.items() if loss is not None} == set(losses)
        for segment, loss in losses.items():
            assert found[segment] == pytest.approx(loss, rel=1e-3)
    state = reference.state()
    for result in results:
        for name, tensor in result["state"].items():
            assert_close(tensor, state[name], **CLOSE)


@pytest.mark.parametrize(("mode", "section"), ROWS[:3], ids=[mode for mode, _ in ROWS[:3]])
def test_one_rank_and_two_give_the_same_numbers(mode, section):
    alone, both = train(section, ranks=1, steps=4), train(section, steps=4)
    assert losses_of(alone) == pytest.approx(losses_of(both), rel=1e-6)


VARIANTS = {
    "activation checkpointing": {"pipeline": {"activation_checkpoint_interval": 1}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, ZeRO-1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_learn_as_fp32_does(name):
    plain, other = train({"mode": "local"}), train({"mode": "local"}, **VARIANTS[name])
    exact = "bf16" not in name
    assert losses_of(other) == pytest.approx(losses_of(plain), rel=1e-5 if exact else 2e-2)


def test_compiled_layers_learn_as_others_do():
    plain = train({"mode": "chunked"}, steps=3)
    compiled = train({"mode": "chunked", "compile": True}, steps=3)
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-3)


COPIED = {"refresh_every": 1}
LOCAL = {"mode": "local"}
RUNS = {
    "sampled, shared": (
        {**LOCAL, "head": {"token_fraction": 0.5, "readout": "shared", **COPIED}},
        {},
    ),
    "tracked": ({**LOCAL, "head": {"blocks": 1, "blocks_from": "next_tracked", **COPIED}}, {}),
    "frequent": ({**LOCAL, "head": {"vocabulary": 8}}, {"token_counts": [1] * 64}),
    "sampled softmax": (
        {**LOCAL, "head": {"vocabulary": 8, "rare_samples": 8}},
        {"token_counts": [1] * 64},
    ),
    "companion": ({**LOCAL, "head": {"companion": 0.5, "token_fraction": 0.5}}, {}),
    "int8": ({**LOCAL, "link": {"codec": "int8"}}, {}),
    "run ahead": ({"mode": "backprop", "run_ahead": 1}, {}),
    "predicted": ({"mode": "backprop", "run_ahead": 1, "predict_weights": True}, {}),
    "mix": (
        {"mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}], "correction": 1.0},
        {},
    ),
    "by tokens": ({**LOCAL, "loss_weighting": "token"}, {}),
    "documents": (LOCAL, {"apart": True}),
    "experts": (LOCAL, {"model": MIXTRAL}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_from_its_checkpoint(run, tmp_path):
    section, settings = RUNS[run]
    section = {**section, "segments_per_stage": 2}
    folder = str(tmp_path)
    whole = run_ranks(on_device.save_halfway, 2, folder, section, 2, timeout=200, **settings)
    rest = run_ranks(on_device.go_on, 2, folder, section, 2, timeout=200, **settings)
    for (losses, state), (others, other) in zip(whole, rest, strict=True):
        assert others == (losses if None in losses else pytest.approx(losses, rel=1e-5))
        for name, tensor in state.items():
            assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_masters_in_zero_go_on_too(tmp_path):
    settings = VARIANTS["bf16, ZeRO-1"]
    section = {"mode": "local", "segments_per_stage": 2}
    whole = run_ranks(on_device.save_halfway, 2, str(tmp_path), section, 2, timeout=200, **settings)
    rest = run_ranks(on_device.go_on, 2, str(tmp_path), section, 2, timeout=200, **settings)
    for (losses, _), (others, _) in zip(whole, rest, strict=True):
        assert others == pytest.approx(losses, rel=1e-3)


def test_a_step_that_is_not_finite_is_left_out():
    """A rate that throws weights to infinity: steps are left out and the weights stay finite."""
    results = run_ranks(on_device.skip_one, 2, 2, timeout=200)
    for skipped, finite, losses in results:
        assert skipped == 1
        assert finite
        assert all(loss == loss for loss in losses[3:])


@pytest.mark.device
def test_everything_is_on_the_device():
    for found in run_ranks(on_device.places, 2, {"mode": "local"}, 2, timeout=200):
        shared = torch.cuda.device_count() < 2
        assert found == {
            "weights": {"cuda"},
            "loss": "cuda",
            "largest": "cuda",
            "backend": "gloo" if shared else "nccl",
        }


@pytest.mark.device
def test_past_host_needs_a_device_for_each_rank():
    shared = {**LOCAL, "head": {"readout": "shared", **COPIED}}  # taken steps after it is sent
    for plain in ({"mode": "backprop"}, shared):
        section = {**plain, "link": {"past_host": True}}
        if torch.cuda.device_count() > 1:
            direct = run_ranks(jobs.train, 2, section, 2, 12, timeout=200)
            staged = run_ranks(jobs.train, 2, plain, 2, 12, timeout=200)
            assert direct[0]["reports"] == staged[0]["reports"]
        else:
            with pytest.raises(Exception, match="2 ranks share 1 on this machine"):
                run_ranks(jobs.train, 2, section, 2, 1, timeout=200)
