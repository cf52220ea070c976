"""What a pipeline writes is what the whole model would write."""

import jobs
import torch
from ranks import run_ranks
from reference import batch

from ds_local.training import samples

TOKENS = 6


def write(section, stages, greedy=True):
    from ds_local.training import samples

    if greedy:
        samples.TOP_K = 1
    engine = jobs.build(section, stages)
    ids = batch(7, 0, 0)
    engine.eval_losses = {0: 1.0}
    found = samples.continued(engine, ids, 4, TOKENS)
    return found, engine.eval_losses, likeliest(engine, found) if stages == 1 else None


def likeliest(engine, written):
    """What the model finds likeliest after each position of a text."""
    ids = torch.zeros(2, 16, dtype=torch.int64)
    ids[0, : len(written)] = written
    _, logits = engine.eval_batch(iter([ids]), return_logits=True, num_micro_batches=1)
    return logits[0].argmax(-1)[: len(written)]


def test_stages_write_what_one_process_writes():
    section = {"mode": "local", "segments_per_stage": 4}
    alone, losses, expected = run_ranks(write, 1, section, 1)[0]
    assert torch.equal(alone[4:], expected[3:-1])
    for found, *_ in run_ranks(write, 4, {"mode": "local", "segments_per_stage": 2}, 2):
        assert torch.equal(found, alone)
    assert len(alone) == 4 + TOKENS
    assert torch.equal(alone[:4], batch(7, 0, 0)[0, :4])
    assert losses == {0: 1.0}  # those of the validation before it stay


def test_a_draw_depends_on_seed_and_step_alone():
    section = {"mode": "local", "segments_per_stage": 2}
    one = run_ranks(write, 2, section, 2, greedy=False)
    again = run_ranks(write, 2, section, 2, greedy=False)
    other = run_ranks(write, 2, {**section, "seed": 5}, 2, greedy=False)
    assert torch.equal(one[0][0], again[0][0])
    assert torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], other[0][0])


def test_the_likeliest_token_is_taken_where_nothing_is_finite():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, float("inf"), 1.0])
    assert samples._drawn(logits, generator) == 1
    assert samples._drawn(torch.tensor([9.0, -1000.0]), generator) == 0
