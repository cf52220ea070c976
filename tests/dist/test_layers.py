"""Layers may pass on anything, in place or not: weights after some steps are those of one-process
autograd, in every row, on 1, 2 or 4 ranks."""

import functools

import nets
import pytest
import torch
from ranks import run_ranks
from reference import table_of
from samples import sampled

STEPS, MICRO_BATCHES = 2, 3
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


def build(
    stages, layers, section=None, loss=None, optimizer=None, gradient_clipping=0.0, **settings
):
    import ds_local

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "optimizer": optimizer or {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": gradient_clipping,
        "local_parallel": section or {"mode": "backprop"},
    }
    module = ds_local.LocalPipelineModule(
        layers,
        stages,
        loss_fn=loss or (lambda outputs, labels: outputs[0].square().mean()),
        head=functools.partial(nets.Head, "one tensor"),
        config=config,
        **settings,
    )
    return ds_local.initialize(model=module, config=config)[0]


class First(torch.nn.Linear):
    """Reads the first of what the layer below passes on."""

    def forward(self, inputs):
        return (super().forward(inputs[0]),)


def said_of(outputs, link=None):
    """What a stage says whose first layer passes on something."""
    import ds_local

    class Odd(torch.nn.Linear):
        def forward(self, x):
            return outputs(super().forward(x))

    section = {"mode": "backprop", "link": link or {}, "segments_per_stage": 1}
    engine = build(2, [Odd(6, 6), First(6, 6)], section, parts=[0, 1, 2])
    try:
        engine.train_batch(iter([nets.data(0, 0)] if engine.is_first_stage() else []))
    except ds_local.ConfigError as error:
        return str(error)
    except ds_local.DsLocalError as error:
        return error.reason


def a_set(x):
    return x, {1, 2}


def two_floats(x):
    return x, x * 2


@pytest.mark.parametrize(
    ("outputs", "link", "words"),
    [
        (a_set, None, "layer 0 (Odd) passes on a set"),
        (two_floats, {"codec": "int8"}, "layer 0 (Odd) passes on 2 floating-point tensors"),
    ],
)
def test_what_cannot_travel_is_named_with_its_layer(outputs, link, words):
    for said in run_ranks(said_of, 2, outputs, link):
        assert words in said


def spoilt(kind):
    """What autograd says when a loss changes what the layer below keeps for its backward pass."""
    engine = build(1, [torch.nn.Linear(6, 6), torch.nn.Tanh()], loss=kind)
    try:
        engine.train_batch(iter([nets.data(0, 0)]))
    except RuntimeError as error:
        return str(error)


def halve(outputs, labels):
    return outputs.mul_(0.5).square().mean()


def test_a_loss_that_spoils_what_autograd_keeps_is_refused_by_autograd():
    assert "modified by an inplace operation" in run_ranks(spoilt, 1, halve)[0]


def with_dropout(stages):
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(6, 6) if number % 2 else torch.nn.Dropout(0.5, inplace=True)
        for number in range(nets.LAYERS)
    ]
    section = {"mode": "overlapping", "segments_per_stage": nets.SEGMENTS // stages}
    engine = build(stages, layers, section, parts=nets.PARTS)
    data = iter([nets.data(0, m) for m in range(3)]) if engine.is_first_stage() else None
    for _ in range(3):
        engine.train_batch(data)
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def test_dropout_in_place_gives_the_same_bits_on_any_number_of_ranks():
    one, two, four = (run_ranks(with_dropout, ranks, ranks) for ranks in (1, 2, 4))
    for results in (two, four):
        for part in results:
            assert all(torch.equal(tensor, one[0][name]) for name, tensor in part.items())


def changing(values):
    """What stage 0 says when the layer passes on something else in the second step."""
    import ds_local

    class Changing(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), values.pop(0)

    engine = build(2, [Changing(6, 6), First(6, 6)], parts=[0, 1, 2])
    data = [nets.data(0, 0)] * 2 if engine.is_first_stage() else []
    try:
        for _ in range(2):
            engine.train_batch(iter(data))
    except ds_local.DsLocalError as error:
        return str(error)


@pytest.mark.parametrize("values", [[1, -7], [None, 3], [True, None]])
def test_numbers_and_kinds_may_change_from_message_to_message(values):
    assert run_ranks(changing, 2, values) == [None, None]


def test_what_cannot_travel_is_named_in_a_later_message_too():
    for said in run_ranks(changing, 2, [None, {1}]):
        assert "layer 0 (Changing) passes on a set" in said


KINDS = [*nets.ALONE, nets.TOGETHER]


@pytest.mark.parametrize(  # every kind on any number of ranks
    "section", sampled([ROWS[n] for n in (0, 3, 5, 8, 10, 13)], ROWS), ids=str
)
def test_weights_are_those_of_one_process_autograd(section):
    """All kinds together and two of those alone, each on one rank, two or four in turn: what a
    number of ranks changes is held to the bit in test_rows.py."""
    number = ROWS.index(section)
    kinds = [nets.TOGETHER, *nets.ALONE[number % 2 :: 2]]
    shift = number // 2 % 3  # so that each kind meets each number of ranks
    ordered = kinds[shift:] + kinds[:shift]
    check_weights(section, *([kind] for kind in ordered))


@pytest.mark.slow
@pytest.mark.parametrize("section", ROWS, ids=str)
def test_weights_of_every_kind_on_any_number_of_ranks(section):
    check_weights(section, KINDS, KINDS, KINDS)


def check_weights(section, on_one, on_two, on_four):
    runs = {
        (ranks, checkpoint): run_ranks(train, ranks, section, ranks, checkpoint, kinds)
        for ranks, checkpoint, kinds in ((1, 0, on_one), (2, 1, on_two), (4, 0, on_four))
    }
    for kind in dict.fromkeys([*on_one, *on_two, *on_four]):
        state = expected(section, kind)
        first = nets.Net(kind, torch.optim.SGD).state()
        moved = {name for name in state if not torch.equal(state[name], first[name])}
        assert len(moved) > 10
        for run, results in runs.items():
            if kind not in results[0]:
                continue
            found = {name: tensor for part in results for name, tensor in part[kind].items()}
            assert moved <= found.keys()
            for name, tensor in found.items():
                where = f"{kind}, {name}, (ranks, checkpoint) = {run}\n"
                close = {"rtol": 1e-4, "atol": 2e-6}
                torch.testing.assert_close(tensor, state[name], **close, msg=where.__add__)


class Branches(torch.nn.Module):
    """One of two matrices, by the data."""

    def __init__(self):
        super().__init__()
        self.negative, self.positive = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x):
        return (self.positive if x.flatten()[0] > 0 else self.negative)(x)


def with_branches():
    """Replica 0 always takes one branch, replica 1 the other one in the second step alone; a third
    matrix is never used."""
    import torch.distributed as dist

    torch.manual_seed(0)
    layer, first = Branches(), torch.nn.Linear(6, 6)
    layer.never = torch.nn.Linear(6, 6)
    adam = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.1, "torch_adam": True}}
    section = {"mode": "backprop", "segments_per_stage": 1}
    engine = build(1, [layer, first], section, optimizer=adam, gradient_clipping=0.5)
    before = layer.never.weight.detach().clone()
    for step in range(3):
        sign = -1.0 if dist.get_rank() and step == 1 else 1.0
        engine.train_batch(iter([(torch.full((4, 6), sign), torch.zeros(4, 6))]))
    assert torch.equal(before, layer.never.weight)  # no replica has a gradient: it does not decay
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def test_replicas_stay_equal_where_one_alone_has_a_gradient():
    one, other = run_ranks(with_branches, 2)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def with_a_layer_twice():
    """How far one step of SGD goes, whose clipped gradient has the norm 1; checkpoints too."""
    torch.manual_seed(0)
    twice = torch.nn.Linear(6, 6)
    layers = [twice, torch.nn.Linear(6, 6), twice, torch.nn.Linear(6, 6)]
    sgd = {"type": "SGD", "params": {"lr": 1.0}}
    far = []
    for parts in ([0, 4], [0, 2, 4]):
        section = {"mode": "backprop", "segments_per_stage": len(parts) - 1}
        engine = build(
            1, layers, section, loss=loud, optimizer=sgd, gradient_clipping=1.0, parts=parts
        )
        before = [p.detach().clone() for p in engine.module.parameters()]
        engine.train_batch(iter([nets.data(0, 0)]))
        moved = zip(before, engine.module.parameters(), strict=True)
        far.append(sum((new - old).square().sum() for old, new in moved).sqrt().item())
        engine.destroy()
    return far


def loud(outputs, labels):
    return 1e3 * outputs.square().mean()


def test_a_layer_that_comes_twice_is_clipped_once():
    """In one segment, or in two of one stage, each of which has a norm of its own."""
    one, two = run_ranks(with_a_layer_twice, 1)[0]
    assert one == pytest.approx(1.0, rel=1e-4)
    assert two == pytest.approx(2**0.5, rel=1e-4)


def with_a_tied_head(stages):
    """How far one step of SGD goes whose head has the weights of the layer above it."""
    import ds_local

    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 6) for _ in range(2)]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "local_parallel": {"mode": "local", "segments_per_stage": 2 // stages},
    }
    head = nets.Head("one tensor", 0)
    head.readout = layers[1]
    try:
        module = ds_local.LocalPipelineModule(
            layers, stages, loss_fn=loud, head=lambda segment: head, config=config
        )
    except ds_local.ConfigError as error:
        return str(error)
    engine = ds_local.initialize(model=module, config=config)[0]
    before = layers[1].weight.detach().clone()
    bias = layers[1].bias.detach().clone()
    engine.train_batch(iter([nets.data(0, 0)]))
    moved = (layers[1].weight - before).square().sum() + (layers[1].bias - bias).square().sum()
    return moved.sqrt().item()


def test_a_head_that_has_weights_of_a_layer_is_clipped_once():
    alone = run_ranks(with_a_tied_head, 1, 1)[0]
    assert 0.5 < alone <= 1.0
    for said in run_ranks(with_a_tied_head, 2, 2):
        assert "the head of segment 0 shares weights with layer 1" in said


def without_weights():
    import ds_local

    try:
        build(2, [torch.nn.Linear(6, 6), torch.nn.Tanh()], parts=[0, 1, 2])
    except ds_local.ConfigError as error:
        return str(error)


def test_a_stage_without_weights_is_refused_on_all_ranks():
    for said in run_ranks(without_weights, 2):
        assert "stage 1 has no weights" in said


def with_a_tied_loss(stages):
    """What is said of a loss that uses the weights of layer 0."""
    import ds_local

    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 6) for _ in range(2)]
    section = {"mode": "backprop", "segments_per_stage": 2 // stages}

    def loss(outputs, labels):
        return torch.nn.functional.linear(outputs, layers[0].weight).square().mean()

    engine = build(stages, layers, section, loss=loss)
    try:
        engine.train_batch(iter([nets.data(0, 0)]))
    except ds_local.DsLocalError as error:
        return str(error)


def test_a_loss_that_uses_weights_of_another_stage_is_refused():
    assert run_ranks(with_a_tied_loss, 1, 1) == [None]
    for said in run_ranks(with_a_tied_loss, 2, 2):
        assert "in the loss of segment 1 are weights of shape [6, 6]" in said


@pytest.mark.parametrize("tied", ["spec", "module"])
def test_weights_that_stages_would_share_are_refused(tied, monkeypatch):
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    import ds_local

    monkeypatch.setenv("WORLD_SIZE", "2")
    linear = torch.nn.Linear(6, 6)
    layers, words = {
        "spec": ([TiedLayerSpec("t", torch.nn.Linear, 6, 6)] * 2, "layer 0 is a TiedLayerSpec"),
        "module": ([linear, LayerSpec(torch.nn.ReLU), linear], "layers 0 and 2 share weights"),
    }[tied]
    with pytest.raises(ds_local.ConfigError, match=words):
        ds_local.LocalPipelineModule(layers, 2, config={"local_parallel": {"mode": "backprop"}})
