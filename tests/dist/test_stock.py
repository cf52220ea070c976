"""The backprop row against DeepSpeed's own pipeline engines, layer by layer, and layer files in
both directions."""

import jobs
import pytest
import torch
from ranks import run_ranks
from samples import sampled


def stock(kind, stages, steps, gas, folder=None, save=False, **extra):
    """The same layers under DeepSpeed's PipelineEngine or DualPipeVEngine."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
    from reference import GPT2, SEED, batch

    from ds_local.model import blocks, families, heads

    model = families.load_model_config(GPT2)
    layers = [
        LayerSpec(blocks.Embedding, model, SEED),
        *(LayerSpec(blocks.Block, model, i, SEED) for i in range(4)),
        LayerSpec(blocks.Readout, model, SEED),
    ]
    module_class = DualPipeVModule if kind == "dualpipev" else PipelineModule
    module = module_class(
        layers, num_stages=stages, loss_fn=heads.lm_loss, partition_method="uniform"
    )
    config = jobs.ds_config({}, gas, **extra)
    engine = deepspeed.initialize(model=module, config=config)[0]
    if folder and not save:
        engine.load_checkpoint(folder, load_module_only=True)

    def data():
        step = 0
        while True:
            for micro_batch in range(gas):
                ids = batch(step, micro_batch, engine.grid.get_data_parallel_id())
                yield ids, ids
            step += 1

    batches = data()
    losses = [engine.train_batch(batches).item() for _ in range(steps)]
    if save:
        engine.save_checkpoint(folder)
    return {"losses": losses, "state": jobs.state_of(engine)}


def merged(results):
    return {name: tensor for result in results for name, tensor in result["state"].items()}


@pytest.mark.parametrize(
    ("gas", "stages"),
    sampled([(1, 3), (4, 2), (4, 4)], [(gas, stages) for gas in (1, 4) for stages in (2, 3, 4)]),
)
def test_backprop_equals_the_stock_pipeline(stages, gas):
    # clipping off: the stock engine clips fp32 gradients of all stages by stage 0's norm
    theirs = run_ranks(stock, stages, "pipeline", stages, 8, gas, gradient_clipping=0.0)
    ours = run_ranks(
        jobs.train, stages, {"mode": "backprop"}, stages, 8, gas=gas, gradient_clipping=0.0
    )
    check(ours, theirs, rtol=2e-4, atol=2e-5)


def check(ours, theirs, **tolerance):
    last = max(row for row in ours[0]["reports"][0])
    got = torch.tensor([row[last] for row in ours[0]["reports"]])
    torch.testing.assert_close(got, torch.tensor(theirs[0]["losses"]), **tolerance)
    mine, other = merged(ours), merged(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], **tolerance)


def test_backprop_equals_the_stock_pipeline_in_bf16_within_rounding():
    extra = {"bf16": {"enabled": True}, "gradient_clipping": 0.0}
    theirs = run_ranks(stock, 2, "pipeline", 2, 8, 4, **extra)
    ours = run_ranks(jobs.train, 2, {"mode": "backprop"}, 2, 8, gas=4, **extra)
    check(ours, theirs, rtol=2e-2, atol=2e-2)


def test_backprop_equals_dualpipev():
    theirs = run_ranks(stock, 2, "dualpipev", 2, 4, 4, gradient_clipping=0.0)
    ours = run_ranks(jobs.train, 2, {"mode": "backprop"}, 2, 4, gas=4, gradient_clipping=0.0)
    last = max(ours[0]["reports"][0])
    got = torch.tensor([row[last] for row in ours[0]["reports"]])
    torch.testing.assert_close(got, torch.tensor(theirs[0]["losses"]), rtol=2e-5, atol=0)


def ours_with_checkpoint(folder, save):
    engine = jobs.build({"mode": "local"}, 2, gradient_clipping=0.0)
    if not save:
        engine._curr_ckpt_path = folder
        engine.module.load_state_dir(folder, engine.checkpoint_engine)
    data = jobs.batches(engine)
    for _ in range(2 if save else 0):
        engine.train_batch(data)
    if save:
        engine.save_checkpoint(folder)
    engine.eval_batch(jobs.batches(engine, start=500), num_micro_batches=4)
    return {"eval": engine.eval_losses, "state": jobs.state_of(engine)}


def evaluate_stock(folder, tag):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from reference import GPT2, SEED, batch

    from ds_local.model import blocks, families, heads

    model = families.load_model_config(GPT2)
    layers = [
        LayerSpec(blocks.Embedding, model, SEED + 1),
        *(LayerSpec(blocks.Block, model, i, SEED + 1) for i in range(4)),
    ]
    module = PipelineModule(
        [*layers, LayerSpec(blocks.Readout, model, SEED + 1)], num_stages=2, loss_fn=heads.lm_loss
    )
    engine = deepspeed.initialize(model=module, config=jobs.ds_config({}))[0]
    engine.module.load_state_dir(f"{folder}/{tag}", engine.checkpoint_engine)
    data = iter([(batch(500, m, 0), batch(500, m, 0)) for m in range(4)])
    return engine.eval_batch(data).item()


def test_the_trunk_trained_here_loads_in_a_stock_pipeline(tmp_path):
    ours = run_ranks(ours_with_checkpoint, 2, str(tmp_path), True)
    theirs = run_ranks(evaluate_stock, 2, str(tmp_path), "global_step2")
    assert theirs[0] == pytest.approx(ours[0]["eval"][1], rel=1e-6)


def test_layer_files_of_a_stock_pipeline_load_here(tmp_path):
    theirs = run_ranks(stock, 2, "pipeline", 2, 2, 4, str(tmp_path), True, gradient_clipping=0.0)
    ours = run_ranks(ours_with_checkpoint, 2, str(tmp_path / "global_step2"), False)
    mine = {name: tensor for name, tensor in merged(ours).items() if not name.startswith("heads")}
    other = merged(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
