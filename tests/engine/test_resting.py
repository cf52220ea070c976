"""A head that a phase does not use keeps its weights and moments, whatever the optimizer."""

import jobs
import pytest
import torch
from ranks import run_ranks

DECAY = {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}
PHASES = [{"mode": "local", "until_step": 2}, {"mode": "backprop", "until_step": 4}]


def train(stages, precision):
    """Weights of heads, and of layers, and the whole stage's moments, after every step."""
    from ds_local.engine.deepspeed_seam import shares_of

    optimizer = {"type": "AdamW", "params": DECAY}
    section = {"phases": [*PHASES, {"mode": "local"}], "segments_per_stage": 2}
    settings = {"model": {"n_layer": 2}, "optimizer": optimizer, "gas": 1}
    engine = jobs.build(section, stages, **settings, **jobs.PRECISIONS[precision])
    data, seen = jobs.batches(engine), []
    for _ in range(5):
        engine.train_batch(data)
        moments = {
            share.parameter: [
                tensor.flatten()[share.offset : share.offset + share.length].clone()
                for tensor in engine.basic_optimizer.state[share.holder].values()
                if tensor.numel() == share.holder.numel() > 1
            ]
            for group in shares_of(engine.optimizer)
            for share in group
        }
        heads = [*engine.module.heads.parameters()]
        layers = [p for p in engine.module.segment_parameters(0) if all(p is not h for h in heads)]
        seen.append(
            [
                [[p.detach().clone(), *moments[p]] for p in part if p.requires_grad]
                for part in (heads, layers)
            ]
        )
    return seen


def moved(before, after):
    return [not all(map(torch.equal, old, new)) for old, new in zip(before, after, strict=True)]


@pytest.mark.parametrize("precision", jobs.PRECISIONS)
def test_a_head_that_is_not_in_use_rests(precision):
    for seen in run_ranks(train, 2, 1, precision):
        for step in range(1, 5):
            heads, layers = map(moved, seen[step - 1], seen[step])
            assert any(layers), step
            assert (any(heads), all(heads)) == ((False,) * 2 if step in (2, 3) else (True,) * 2)
