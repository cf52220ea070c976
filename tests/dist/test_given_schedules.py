"""Schedules from files, executed: torch's own, with segments where torch puts them, against torch
and against one process."""

import pytest
import torch
import torch_sheets
from ranks import run_ranks

WIDTH, SEGMENTS, MICRO_BATCHES, LR = 6, 4, 4, 0.1


def layers_of(seed):
    from torch import nn

    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(SEGMENTS)]


def data_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2 * MICRO_BATCHES, WIDTH, generator=generator)


def engine_of(path, split):
    import ds_local

    section = {"mode": "backprop", "segments_per_stage": 2, "schedule": str(path)}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "local_parallel": section | {"split_backward": split},
    }
    module = ds_local.LocalPipelineModule(
        layers_of(0), 2, torch_sheets.loss_of, config=config, parts=list(range(SEGMENTS + 1))
    )
    return ds_local.initialize(model=module, config=config)[0]


def both(folder):
    """For each of torch's schedules what torch and this package make of it, on this rank."""
    found = {}
    for name in torch_sheets.PLACEMENTS:
        x, y = data_of(1)
        theirs = torch_sheets.train(name, layers_of(0), x, y, MICRO_BATCHES, LR)
        engine = engine_of(f"{folder}/{name}.csv", split=int(name != "Interleaved1F1B"))
        pairs = list(zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True))
        engine.train_batch(iter(pairs))
        losses = {segment: loss.item() for segment, loss in engine.segment_losses.items()}
        weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        evaluated = engine.eval_batch(iter(pairs)).item()
        engine.save_checkpoint(f"{folder}/{name}")
        files = sorted(engine.module.ckpt_layer_path("", n) for n in range(2))
        ours = losses, weights
        found[name] = {"torch": theirs, "ours": ours, "evaluated": evaluated, "files": files}
    return found


def in_one_process():
    layers, (x, y) = layers_of(0), data_of(1)
    net = torch.nn.Sequential(*layers)
    losses = []
    for part, target in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
        loss = torch_sheets.loss_of(net(part), target)
        (loss / MICRO_BATCHES).backward()
        losses.append(loss.item())
    torch.optim.SGD(net.parameters(), LR).step()
    evaluated = torch_sheets.loss_of(net(x), y).item()
    return losses, {n: p.detach() for n, p in net.named_parameters()}, evaluated


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedules")
    for name in torch_sheets.PLACEMENTS:
        torch_sheets.write(name, 2, MICRO_BATCHES, folder / f"{name}.csv")
    return str(folder)


@pytest.fixture(scope="module")
def results(folder):
    return run_ranks(both, 2, folder)


def test_torchs_schedules_run_as_torch_runs_them(results):
    losses, weights, evaluated = in_one_process()
    for name, place in torch_sheets.PLACEMENTS.items():
        last = next(rank for rank in range(2) if SEGMENTS - 1 in place(rank, 2))
        assert results[last][name]["torch"][0] == losses
        mean = pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert results[last][name]["ours"][0] == {SEGMENTS - 1: mean}
        assert results[1 - last][name]["ours"][0] == {}
        for rank, result in enumerate(results):
            assert result[name]["evaluated"] == pytest.approx(evaluated, rel=1e-6)
            ours, theirs = result[name]["ours"][1], result[name]["torch"][1]
            held = {f"{segment}." for segment in place(rank, 2)}
            assert {key[:2] for key in ours} == held == {key[:2] for key in theirs}
            for key, weight in ours.items():
                torch.testing.assert_close(weight, theirs[key], rtol=1e-6, atol=1e-7)
                torch.testing.assert_close(weight, weights[key], rtol=1e-6, atol=1e-7)
            names = [f"layer_{segment:02d}-model_states.pt" for segment in sorted(place(rank, 2))]
            assert result[name]["files"] == names


def moved(folder, name):
    """Load what another placement saved; only weights, since the optimizer's are by stage."""
    engine = engine_of(f"{folder}/{name}.csv", split=1)
    engine.load_checkpoint(f"{folder}/Interleaved1F1B", load_optimizer_states=False)
    return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def test_weights_move_to_another_placement(folder, results):
    saved = [result["Interleaved1F1B"]["ours"][1] for result in results]
    whole = saved[0] | saved[1]
    for rank, weights in enumerate(run_ranks(moved, 2, folder, "ZBVZeroBubble")):
        assert {key[:2] for key in weights} == ({"0.", "3."} if rank == 0 else {"1.", "2."})
        assert all(torch.equal(weight, whole[key]) for key, weight in weights.items())
