"""Running averages of weights in real engines: the same in every layout and after a resume, and
exported."""

import jobs
import pytest
import torch
from ranks import run_ranks
from samples import sampled

from ds_local.checkpoints.hf_export import export
from ds_local.errors import ExportError

DECAY, STEPS = 0.4, 6


def average(section, stages, folder=None, begin=0, **settings):
    """Averages as the engine keeps them and as the weights of every step say, losses of both."""
    engine = jobs.build({"ema": DECAY, **section}, stages, **settings)
    if begin:
        engine.load_checkpoint(folder)
    expected = {k: w.clone() for k, w in jobs.state_of(engine).items()} if not begin else None
    data = jobs.batches(engine, start=begin)
    for step in range(begin + 1, STEPS + 1):
        engine.train_batch(data)
        if expected is not None:
            share = min(DECAY, step / (step + 9))
            for name, weight in jobs.state_of(engine).items():
                expected[name] = share * expected[name] + (1 - share) * weight
        if folder and not begin and step == 3:
            engine.save_checkpoint(folder)
    weights = jobs.state_of(engine)
    with engine.average.in_place():
        kept = jobs.state_of(engine)
        engine.eval_batch(jobs.batches(engine, start=500))
    losses = dict(engine.eval_losses)
    same = all(torch.equal(w, weights[name]) for name, w in jobs.state_of(engine).items())
    if folder and begin:
        engine.save_checkpoint(folder)
    return {"kept": kept, "expected": expected, "losses": losses, "back": same}


def merged(results, key):
    return {name: tensor for result in results for name, tensor in result[key].items()}


@pytest.mark.parametrize("precision", sampled(["fp32"], ["fp32", "bf16"]))
def test_the_average_is_that_of_the_weights_of_every_step_and_goes_on(precision, tmp_path):
    how = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    two = run_ranks(average, 2, {"mode": "local"}, 2, str(tmp_path), **how)
    assert all(result["back"] for result in two)
    kept, expected = merged(two, "kept"), merged(two, "expected")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if not how else {"rtol": 1e-2, "atol": 1e-3}
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name], tensor, **tolerance)
    resumed = run_ranks(average, 2, {"mode": "local"}, 2, str(tmp_path), 3, **how)
    again = merged(resumed, "kept")
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    assert resumed[0]["losses"] == two[0]["losses"]
    if how:
        return
    one = run_ranks(average, 1, {"mode": "local", "segments_per_stage": 2}, 1)
    alone = merged(one, "kept")
    assert all(torch.equal(tensor, alone[name]) for name, tensor in kept.items())
    assert one[0]["losses"] == two[0]["losses"]
    check_export(tmp_path, kept)


def check_export(folder, kept):
    """The exported tensors are the averages, not the weights."""
    from safetensors.torch import load_file

    out = export(folder, folder / "averaged", ema=True)
    plain = export(folder, folder / "plain")
    found, weights = (load_file(one / "model.safetensors") for one in (out, plain))
    assert torch.equal(found["transformer.wte.weight"], kept["0.tokens.weight"])
    assert not torch.equal(found["transformer.wte.weight"], weights["transformer.wte.weight"])
    first = load_file(export(folder, folder / "first", 0, ema=True) / "model.safetensors")
    assert torch.equal(first["lm_head.weight"], kept["heads.0.readout.weight"])


def test_a_run_without_averages_has_none_to_export(tmp_path):
    run_ranks(without, 1, str(tmp_path))
    with pytest.raises(ExportError, match=r"holds no averages of weights; train with"):
        export(tmp_path, tmp_path / "out", ema=True)


def without(folder):
    engine = jobs.build({"mode": "backprop"}, 1)
    engine.train_batch(jobs.batches(engine))
    engine.save_checkpoint(folder)
