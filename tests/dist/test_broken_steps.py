"""A step that fails on its way leaves nothing for the next one, or there is no next one."""

import functools

import nets
import pytest
import torch
from ranks import run_ranks

BF16 = {"bf16": {"enabled": True}}


def build(stages, mode="local", **settings):
    import ds_local

    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 6) for _ in range(4)]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "local_parallel": {"mode": mode, "segments_per_stage": 2 // stages},
        **settings,
    }
    module = ds_local.LocalPipelineModule(
        layers,
        stages,
        loss_fn=lambda outputs, labels: (outputs - labels).square().mean(),
        head=functools.partial(nets.Head, "one tensor"),
        config=config,
    )
    return ds_local.initialize(model=module, config=config)[0]


def micro_batches(steps, dtype=torch.float32):
    return [tuple(t.to(dtype) for t in nets.data(step, m)) for step in steps for m in range(2)]


def ending(batches, error):
    yield from batches
    if error is not None:
        raise error


def gone_on(mode, error):
    """Weights of a run whose second step fails after a micro-batch, and of one without it."""
    from ds_local import errors

    states = []
    for fails in (True, False):
        engine = build(1, mode)
        engine.train_batch(iter(micro_batches([0])))
        if fails:
            with pytest.raises(errors.OutOfData if error is None else type(error)):
                engine.train_batch(ending(micro_batches([1])[:1], error))
        engine.train_batch(iter(micro_batches([2])))
        assert engine.global_steps == 2
        states.append([p.detach().clone() for p in engine.module.parameters()])
        engine.destroy()
    return states


@pytest.mark.parametrize("mode", ["local", "backprop"])
@pytest.mark.parametrize(
    "error", [None, ValueError("a broken record"), KeyboardInterrupt()], ids=str
)
def test_one_process_goes_on_as_if_the_step_had_not_begun(mode, error):
    after, undisturbed = run_ranks(gone_on, 1, mode, error)[0]
    assert all(map(torch.equal, after, undisturbed))


def refused(stages, settings, given):
    """What the step after one that fails says."""
    import ds_local

    engine = build(stages, **settings)
    dtype = torch.bfloat16 if settings else torch.float32
    data = iter(micro_batches([0], dtype)[:given]) if engine.is_first_stage() else None
    said = []
    for _ in range(2):
        try:
            engine.train_batch(data)
            said.append("")
        except ds_local.DsLocalError as error:
            said.append(str(error))
        data = iter(micro_batches([1], dtype)) if engine.is_first_stage() else None
    return said


@pytest.mark.parametrize("stages", [1, 2])
def test_no_step_follows_one_that_left_something(stages):
    """Messages to other stages, or gradients in DeepSpeed's own sums."""
    for first, then in run_ranks(refused, stages, stages, BF16 if stages == 1 else {}, 1):
        assert "the data ran out at micro-batch 1" in first
        assert "step 1 of this engine ended on its way (" in then
    assert run_ranks(refused, 1, 1, BF16, 0)[0][1] == ""


def saved_half(folder):
    import ds_local

    engine = build(1)
    engine.train_batch(iter(micro_batches([0])))

    def interrupted(*_):
        raise KeyboardInterrupt

    engine.basic_optimizer.register_step_post_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.train_batch(iter(micro_batches([1])))
    try:
        engine.save_checkpoint(folder)
    except ds_local.DsLocalError as error:
        return str(error)


def test_weights_of_two_steps_are_not_saved(tmp_path):
    said = run_ranks(saved_half, 1, str(tmp_path))[0]
    assert "step 2 ended in the middle of its update" in said
    assert not list(tmp_path.iterdir())
