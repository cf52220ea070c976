"""Layers may pass on anything, in place or not: weights after some steps are those of one-process
autograd, in every row, on 1, 2 and 4 ranks."""

import functools

import nets
import pytest
import torch
from ranks import run_ranks
from reference import table_of

STEPS, MICRO_BATCHES = 3, 3
ADAM = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}  # decays what has a gradient, though it be 0


def train(section, stages, checkpoint, kinds):
    """The weights of every kind of net after some steps."""
    import ds_local

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "local_parallel": {**section, "segments_per_stage": nets.SEGMENTS // stages},
    }
    states = {}
    for kind in kinds:
        module = ds_local.LocalPipelineModule(
            [nets.make_layer(kind, number) for number in range(nets.LAYERS)],
            stages,
            loss_fn=nets.make_loss(kind),
            head=functools.partial(nets.make_head, kind),
            config=config,
            parts=nets.PARTS,
            activation_checkpoint_interval=checkpoint,
        )
        engine = ds_local.initialize(model=module, config=config)[0]
        given = [nets.data(step, m) for step in range(STEPS) for m in range(MICRO_BATCHES)]
        kept = [tuple(tensor.clone() for tensor in pair) for pair in given]
        batches = iter(given) if engine.is_first_stage() else None
        for _ in range(STEPS):
            engine.train_batch(batches)
        for mine, yours in zip(given, kept, strict=True):
            assert all(map(torch.equal, mine, yours)), "the user's data was changed"
        assert not engine.executor.live
        states[kind] = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        engine.destroy()
    return states


MIX = {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]}
ROWS = [
    {"mode": "local"},
    {"mode": "backprop"},
    {"mode": "backprop", "split_backward": 1},
    {"mode": "backprop", "split_backward": 2},
    {"mode": "chunked", "window": 2},
    {"mode": "chunked", "window": 2, "split_backward": 2},
    {"mode": "shifted_chunked", "window": 2},
    {"mode": "overlapping", "window": 2},
    {"mode": "overlapping", "window": 3, "combine": "mean", "split_backward": 1},
    {"mode": "interlocking", "window": 2},
    {"mode": "interlocking", "window": 3},
    {"mode": "deep_supervision"},
    MIX,
    {
        "mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "chunked", "window": 2}],
        "correction": 0.5,
    },
]


def tables_of(section, step):
    def of(row):
        options = {key: row[key] for key in ("window", "combine") if key in row}
        return table_of(row["mode"], nets.SEGMENTS, step=step, **options)

    if "mix" not in section:
        return [of(section)] * MICRO_BATCHES
    few, rest = (of(row) for row in section["mix"])
    extra = section.get("correction", 0.0) * (MICRO_BATCHES - 1)
    segments = range(nets.SEGMENTS)
    both = {
        loss: {
            s: few.get(loss, {}).get(s, 0.0) * (1 + extra) - extra * rest.get(loss, {}).get(s, 0.0)
            for s in segments
        }
        for loss in few.keys() | (rest.keys() if extra else set())
    }
    return [{loss: {s: w for s, w in row.items() if w} for loss, row in both.items()}] + [rest] * (
        MICRO_BATCHES - 1
    )


def expected(section, kind):
    net = nets.Net(kind, lambda parameters: torch.optim.AdamW(parameters, **ADAM))
    for step in range(STEPS):
        net.step([nets.data(step, m) for m in range(MICRO_BATCHES)], tables_of(section, step))
    return net.state()


@pytest.mark.parametrize("section", ROWS, ids=str)
def test_weights_are_those_of_one_process_autograd(section):
    kinds = [*nets.ALONE, nets.TOGETHER]
    runs = {
        (ranks, checkpoint): run_ranks(train, ranks, section, ranks, checkpoint, kinds)
        for ranks, checkpoint in ((1, 0), (2, 1), (4, 0))
    }
    for kind in kinds:
        state = expected(section, kind)
        first = nets.Net(kind, torch.optim.SGD).state()
        moved = {name for name in state if not torch.equal(state[name], first[name])}
        assert len(moved) > 10
        for run, results in runs.items():
            found = {name: tensor for part in results for name, tensor in part[kind].items()}
            assert moved <= found.keys()
            for name, tensor in found.items():
                where = f"{kind}, {name}, (ranks, checkpoint) = {run}\n"
                close = {"rtol": 1e-4, "atol": 2e-6}
                torch.testing.assert_close(tensor, state[name], **close, msg=where.__add__)
