"""Measured times of each segment's parts."""

import jobs
import pytest
import torch
from families import MIXTRAL
from ranks import run_ranks


def profiled(stages, family, model, beside):
    from ds_local.training import profiling

    section = {"mode": "local", "segments_per_stage": 4 // stages}
    engine = jobs.build(section, stages, family, model=model)
    ids = jobs.batch(0, 0, 0)
    inputs = {"input_ids": ids, **beside(ids)} if beside else ids
    costs = profiling.measure(engine, (inputs, ids))
    left = [name for name, p in engine.module.named_parameters() if p.grad is not None]
    return costs, left


def packed(ids):
    positions = torch.arange(ids.shape[1]).expand(ids.shape).clone()
    positions[:, 5:] -= 5  # a second document
    return {"position_ids": positions}


def masked(ids):
    return {"attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("family", "model", "beside"),
    [("gpt2", None, None), ("llama", None, packed), ("gpt2", MIXTRAL, masked)],
)
def test_every_part_of_every_segment_has_a_time(stages, family, model, beside):
    """Whatever the data brings beside the ids; and nothing is added to the run's gradients."""
    for costs, left in run_ranks(profiled, stages, stages, family, model, beside):
        assert not left
        assert {name: len(seconds) for name, seconds in costs.items()} == dict.fromkeys(costs, 4)
        for name in ("forward", "head"):
            assert all(seconds > 0 for seconds in costs[name]), name
