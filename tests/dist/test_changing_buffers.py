"""Buffers that layers change as they run: the same on all replicas, once for each micro-batch, and
the same after a resume."""

import os

import pytest
import torch
from ranks import run_ranks
from torch import nn

WIDTH, SEGMENTS, MICRO_BATCHES = 6, 4, 2


class Layer(nn.Module):
    """Reads one buffer that is random at first, and changes others."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("mixed", torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return torch.tanh(self.norm(self.linear(x)) @ self.mixed)


class Head(nn.Module):
    def __init__(self, _):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, labels):
        return nn.functional.mse_loss(self.linear(self.norm(hidden)), labels)


def build(stages, section, seed=0, recompute=0):
    import ds_local

    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "local_parallel": {**section, "segments_per_stage": SEGMENTS // stages},
    }
    module = ds_local.LocalPipelineModule(
        [Layer() for _ in range(SEGMENTS)],
        stages,
        loss_fn=nn.functional.mse_loss,
        head=Head,
        config=config,
        parts=range(SEGMENTS + 1),
        activation_checkpoint_interval=recompute,
    )
    return ds_local.initialize(model=module, config=config)[0]


def batches(engine, start=0, bad_step=None):
    if not engine.is_first_stage():
        return None

    def generate():
        step = start
        while True:
            for micro_batch in range(MICRO_BATCHES):
                seed = step * 100 + micro_batch * 10 + engine.replica_id
                generator = torch.Generator().manual_seed(seed)
                x, y = (torch.randn(8, WIDTH, generator=generator) for _ in range(2))
                bad = torch.nan if step == bad_step else 0.0
                yield x + engine.replica_id + bad, y
            step += 1

    return generate()


def found(engine):
    """(losses of an evaluation, buffers and weights)."""
    engine.eval_batch(batches(engine, 100))
    state = {n: tensor.clone() for n, tensor in engine.module.state_dict().items()}
    state |= {f"heads.{n}": t.clone() for n, t in engine.module.heads.state_dict().items()}
    return engine.eval_losses, state


def train(stages, section, steps=3, recompute=0, bad_step=None):
    engine = build(stages, section, recompute=recompute)
    data = batches(engine, bad_step=bad_step)
    for _ in range(steps):
        engine.train_batch(data)
    return found(engine)


def resume(stages, section, folder):
    """What five steps come to, and three with two more after a resume."""
    seed = int(os.environ["RANK"])  # replicas draw other buffers
    engine = build(stages, section, seed)
    data = batches(engine)
    for _ in range(3):
        engine.train_batch(data)
    engine.save_checkpoint(folder)
    for _ in range(2):
        engine.train_batch(data)
    whole = found(engine)
    engine.destroy()
    engine = build(stages, section, seed + 10)
    engine.load_checkpoint(folder)
    data = batches(engine, 3)
    for _ in range(2):
        engine.train_batch(data)
    return whole, found(engine)


def check_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


def test_replicas_have_the_same_buffers_and_a_resumed_run_has_them_too(tmp_path):
    first, second = run_ranks(resume, 2, 1, {"mode": "local"}, str(tmp_path))
    check_same(first[0], second[0])
    for whole, resumed in (first, second):
        check_same(whole, resumed)


@pytest.mark.parametrize(
    "section", [{"mode": "chunked", "run_ahead": 1}, {"mode": "backprop", "run_ahead": "auto"}]
)
def test_what_ran_ahead_of_a_checkpoint_counts_once_in_running_statistics(section, tmp_path):
    for whole, resumed in run_ranks(resume, 2, 2, section, str(tmp_path)):
        check_same(whole, resumed)


@pytest.mark.parametrize("mode", ["backprop", "overlapping"])
def test_what_is_computed_again_counts_once_in_running_statistics(mode):
    plain, again = (run_ranks(train, 1, 1, {"mode": mode}, 3, every)[0] for every in (0, 1))
    assert plain[1]["0.norm.num_batches_tracked"] == 3 * MICRO_BATCHES
    check_same(plain, again)


def test_what_changes_from_a_later_phase_on_keeps_no_trace_of_a_nan():
    phases = [{"mode": "backprop", "until_step": 2}, {"mode": "local"}]
    losses, state = run_ranks(train, 1, 1, {"phases": phases}, 4, 0, 3)[0]
    assert all(loss == loss for loss in losses.values())
    assert len(losses) == SEGMENTS
    assert not [name for name, tensor in state.items() if not tensor.isfinite().all()]
