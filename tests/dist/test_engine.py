"""What the engine promises besides right gradients: no waiting, right labels, little memory,
DeepSpeed's habits."""

import time
from functools import cache

import jobs
import pytest
import torch
from jobs import PRECISIONS
from ranks import RankError, run_ranks
from samples import sampled

MIX = {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]}


SECTIONS = {"local": {"mode": "local"}, "mixed": MIX, "overlapping": {"mode": "overlapping"}}


@cache
def reports_of(name, replicas, precision=None, steps=20):
    settings = PRECISIONS[precision] if precision else {}
    return run_ranks(jobs.train, 2 * replicas, SECTIONS[name], 2, steps, **settings)[0]["reports"]


LEARN = [  # any two of the three together
    (precision, section, 1 + (p + s) % 2)
    for p, precision in enumerate(PRECISIONS)
    for s, section in enumerate(SECTIONS)
]
LEARN_SAMPLE = [LEARN[5], LEARN[7]]  # one replica and two, over few runs in fp32


@pytest.mark.parametrize(("precision", "section", "replicas"), sampled(LEARN_SAMPLE, LEARN))
def test_every_stage_learns_in_every_precision(precision, section, replicas):
    plain, other = reports_of(section, replicas), reports_of(section, replicas, precision)
    for segment in plain[0]:
        fall = plain[0][segment] - plain[-1][segment]
        assert fall > 0.2
        assert other[0][segment] - other[-1][segment] == pytest.approx(fall, rel=0.15)


@pytest.mark.parametrize(
    ("precision", "replicas"),
    sampled(
        [("fp32 ZeRO-1", 2), ("bf16 ZeRO-1, fp32 sums", 1)],
        [(p, n) for p in PRECISIONS for n in (1, 2)],
    ),
)
def test_a_split_backward_changes_no_bit(precision, replicas):
    """DeepSpeed's optimizers see the same gradients although half of them come later."""
    plain, split = (
        run_ranks(
            jobs.train,
            2 * replicas,
            {"mode": "backprop", "split_backward": s},
            2,
            3,
            **PRECISIONS[precision],
        )
        for s in (0, 1)
    )
    for a, b in zip(plain, split, strict=True):
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])
        assert a["own"] == b["own"]


# --- no waiting -----------------------------------------------------------------------------------


def collectives_of_a_step(section, stages, **extra):
    """For every collective during train_batch: the ranks that take part."""
    import torch.distributed as dist

    engine = jobs.build(section, stages, **extra)
    data = jobs.batches(engine)
    engine.train_batch(data)
    seen = []
    names = [
        "all_reduce",
        "broadcast",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "barrier",
        "reduce",
        "gather",
        "scatter",
        "all_to_all",
        "all_to_all_single",
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "monitored_barrier",
        "all_gather_coalesced",
        "all_reduce_coalesced",
    ]

    def counted(name, function):
        def call(*args, **kwargs):
            group = kwargs.get("group") or next(
                (a for a in args if isinstance(a, dist.ProcessGroup)), dist.group.WORLD
            )
            seen.append((name, sorted(dist.get_process_group_ranks(group))))
            return function(*args, **kwargs)

        return call

    saved = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    try:
        for name, function in saved.items():
            setattr(dist, name, counted(name, function))
        for _ in range(3):
            engine.train_batch(data)
    finally:
        for name, function in saved.items():
            setattr(dist, name, function)
    return {"seen": seen, "stage": engine.stage_id, "my_stage": sorted(engine.grid.dp_group)}


ON_THE_PATH = {"local": {"mode": "local"}, "mixed": MIX, "interlocking": {"mode": "interlocking"}}


@pytest.mark.parametrize(
    ("section", "precision"),
    sampled(  # what a section sends hangs not on the precision
        [("local", None), ("mixed", "bf16 ZeRO-0"), ("interlocking", "bf16 ZeRO-1")],
        [(section, precision) for section in ON_THE_PATH for precision in (None, *PRECISIONS)],
    ),
)
def test_no_collective_over_stages_on_the_step_path(section, precision):
    settings = PRECISIONS[precision] if precision else {}
    for result in run_ranks(collectives_of_a_step, 4, ON_THE_PATH[section], 2, **settings):
        beyond = [
            (name, ranks)
            for name, ranks in result["seen"]
            if not set(ranks) <= set(result["my_stage"])
        ]
        assert not beyond
        assert any(
            ranks == result["my_stage"] for _, ranks in result["seen"]
        )  # the count itself works: replicas do meet


def sleepy(stages, slow, nap, steps, depth):
    """Seconds that each of the first steps took on this stage; stage `slow` sleeps in every
    forward."""
    import time

    from torch import nn

    import ds_local

    class Layer(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage = stage
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden):
            if self.stage == slow:
                time.sleep(nap)
            return self.linear(hidden)

    class Head(nn.Module):
        def forward(self, hidden, labels):
            return hidden.square().mean()

    config = jobs.ds_config({"mode": "local", "link": {"depth": depth}}, gas=1)
    module = ds_local.LocalPipelineModule(
        [Layer(s) for s in range(stages)],
        stages,
        loss_fn=lambda h, y: h.square().mean(),
        head=lambda s: Head(),
        config=config,
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    seconds = []
    data = iter([(torch.ones(2, 8), torch.zeros(2))] * steps)
    for _ in range(steps):
        began = time.perf_counter()
        engine.train_batch(data)
        seconds.append(time.perf_counter() - began)
    return seconds


def test_a_slow_last_stage_does_not_slow_the_first_until_the_link_is_full():
    nap, depth = 0.4, 2
    first, last = run_ranks(sleepy, 2, 2, 1, nap, 12, depth)
    assert min(last) >= nap
    # two messages under way and two received ahead: the first steps do not notice the nap, later
    # ones wait for it
    assert sum(first[1:depth]) < nap / 2
    assert sum(first[-3:]) > 2 * nap


def test_a_slow_first_stage_keeps_nobody_from_finishing():
    seconds = run_ranks(sleepy, 3, 3, 0, 0.1, 4, 4)
    assert all(len(steps) == 4 for steps in seconds)


# --- labels ---------------------------------------------------------------------------------------


def mismatch(section, stages, replicas_differ, gas=4):
    """The loss of segment s is the distance between its input, which carries the batch's number,
    and its labels."""
    from torch import nn

    import ds_local

    class Keep(nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(1))

        def forward(self, hidden):
            return hidden + 0.0 * self.zero

    class Distance(Keep):
        def forward(self, hidden, labels):
            return (hidden + 0.0 * self.zero - labels).abs().mean()

    config = jobs.ds_config(section, gas=gas, gradient_clipping=0.0)
    num_segments = stages * section.get("segments_per_stage", 1)
    module = ds_local.LocalPipelineModule(
        [Keep() for _ in range(num_segments)],
        stages,
        loss_fn=lambda h, y: (h - y).abs().mean(),
        head=lambda s: Distance(),
        config=config,
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    generator = torch.Generator().manual_seed(engine.replica_id)

    def data():
        while True:
            number = torch.randint(0, 10**6, (2, 3), generator=generator).float()
            yield number, number

    batches = data()
    worst = 0.0
    for step in range(6):
        engine.train_batch(batches)
        worst = max([worst, *(loss.item() for loss in engine.segment_losses.values())])
        if step == 3:
            engine.eval_batch(data())
            worst = max([worst, *engine.eval_losses.values()])
    return worst


@pytest.mark.parametrize(
    "section",
    [{"mode": "local"}, MIX, {"mode": "overlapping"}, {"mode": "local", "segments_per_stage": 2}],
    ids=str,
)
@pytest.mark.parametrize(("ranks", "stages"), [(4, 4), (4, 2)])
def test_labels_belong_to_their_inputs(section, ranks, stages):
    assert run_ranks(mismatch, ranks, section, stages, True) == [0.0] * ranks


# --- memory ---------------------------------------------------------------------------------------


def live_bytes(section, stages, gas):
    """Largest number of bytes that autograd keeps for backward during a step, and how many one
    micro-batch needs."""
    engine = jobs.build(section, stages, gas=gas)
    data = jobs.batches(engine)
    engine.train_batch(data)
    parameters = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    now = peak = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal now, peak
            self.tensor = tensor
            self.size = 0 if tensor.untyped_storage().data_ptr() in parameters else tensor.nbytes
            now += self.size
            peak = max(peak, now)

        def __del__(self):
            nonlocal now
            now -= self.size

    def measure(action):
        nonlocal peak
        peak = now
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            action()
        return peak

    whole_step = measure(lambda: engine.train_batch(data))
    segment = engine.module.local_segments[0]
    inputs = jobs.batch(0, 0, 0) if segment == 0 else torch.zeros(2, 16, 32)

    def one_micro_batch():
        engine.module.train()
        engine.module.run_segment(segment, inputs)

    return whole_step, measure(one_micro_batch), engine.stage_id


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("gas", [2, 8])
def test_local_training_keeps_one_micro_batch_alive_whatever_the_depth(stages, gas):
    for step, one, stage in run_ranks(live_bytes, stages, {"mode": "local"}, stages, gas):
        # the head's logits come and go while the segment's activations wait: they are not a second
        # micro-batch
        head = 2 * 16 * 64 * 4 * 4 + 2 * 16 * 32 * 4 * 4
        assert one <= step <= one + head, stage


def test_backprop_keeps_one_micro_batch_for_each_stage_above():
    results = run_ranks(live_bytes, 4, {"mode": "backprop"}, 4, 8)
    ratios = [step / one for step, one, _ in results]
    assert ratios[0] == pytest.approx(4, rel=0.1)
    assert ratios[1] == pytest.approx(3, rel=0.1)


# --- DeepSpeed's habits ---------------------------------------------------------------------------


def tuples(stages, section):
    """Layers that pass a float tensor, a mask and integers along."""
    from torch import nn

    import ds_local

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, inputs):
            hidden, mask, index = inputs
            return self.linear(hidden) * mask.unsqueeze(-1), mask, index

    class Head(nn.Module):
        def forward(self, hidden, labels):
            return hidden[0].square().mean() + 0 * (hidden[2] - labels).abs().float().mean()

    def loss_fn(outputs, labels):
        assert outputs[1].dtype == torch.bool
        assert torch.equal(outputs[2], labels)
        return outputs[0].square().mean()

    torch.manual_seed(
        0
    )  # ranks have run other tests before; a loss that is nearly 0 by chance cannot fall
    config = jobs.ds_config(section, gas=2)
    module = ds_local.LocalPipelineModule(
        [Layer() for _ in range(stages)], stages, loss_fn, lambda s: Head(), config
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    index = torch.arange(6).view(2, 3)
    data = iter([((torch.ones(2, 3, 4), torch.ones(2, 3).bool(), index), index)] * 40)
    losses = []
    for _ in range(20):
        engine.train_batch(data)
        losses.append(list(engine.segment_losses.values())[-1].item())
    return losses


@pytest.mark.parametrize(
    "section", [{"mode": "local"}, {"mode": "overlapping"}], ids=["local", "overlapping"]
)
def test_layers_may_pass_tuples_with_integers_and_masks(section):
    for losses in run_ranks(tuples, 3, 3, section):
        assert losses[-1] < losses[0]


def with_client_parts(stages):
    """training_data, a client optimizer and a scheduler object, as in any DeepSpeed script."""
    import ds_local

    config = jobs.ds_config({"mode": "local"}, gas=2)
    del config["optimizer"]
    module = ds_local.causal_lm(jobs.MODELS["gpt2"], num_stages=stages, config=config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    # the same eight three times: DeepSpeed starts a process for each worker at each new beginning
    dataset = [(jobs.batch(0, 0, i)[0], jobs.batch(0, 0, i)[0]) for i in range(8)] * 3
    engine, got, _loader, got_scheduler = ds_local.initialize(
        model=module,
        config=config,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        training_data=dataset,
    )
    losses = [engine.train_batch().item() for _ in range(10)]
    return losses, engine.get_lr(), got is optimizer, got_scheduler is scheduler


def test_training_data_client_optimizer_and_scheduler():
    for losses, lr, same_optimizer, same_scheduler in run_ranks(with_client_parts, 2, 2):
        assert losses[-1] < losses[0]
        assert lr == [pytest.approx(1e-2 / 11)]
        assert same_optimizer
        assert same_scheduler


def rates_with_named_schedule(stages):
    scheduler = {
        "type": "WarmupStableDecayLR",
        "params": {"total_num_steps": 6, "warmup_num_steps": 2, "decay_num_steps": 2},
    }
    engine = jobs.build({"mode": "local"}, stages, scheduler=scheduler)
    data = jobs.batches(engine)
    full, rates = engine.lr_scheduler.full_rates[0], []
    for _ in range(6):
        rates.append(engine.get_lr()[0] / full)
        engine.train_batch(data)
    return rates


def test_a_schedule_that_deepspeed_lacks():
    for rates in run_ranks(rates_with_named_schedule, 2, 2):
        assert rates == [0.5, 1, 1, 1, 1, 0.5]


def with_checkpointing(section, interval):
    import ds_local

    config = jobs.ds_config(section)
    model = {**jobs.MODELS["gpt2"], "resid_pdrop": 0.1}
    module = ds_local.causal_lm(
        model, num_stages=2, config=config, activation_checkpoint_interval=interval
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    data = jobs.batches(engine)
    for _ in range(3):
        engine.train_batch(data)
    return jobs.state_of(engine)


SPLIT = {"mode": "backprop", "split_backward": 1}


@pytest.mark.parametrize(
    "section",
    [{"mode": "local"}, {"mode": "overlapping"}, SPLIT],
    ids=["local", "overlapping", "split"],
)
def test_activation_checkpointing_changes_no_bit(section):
    plain = run_ranks(with_checkpointing, 2, section, 0)
    recomputed = run_ranks(with_checkpointing, 2, section, 1)
    for a, b in zip(plain, recomputed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def interrupted(folder, interrupt):
    engine = jobs.build(MIX, 2)
    data = jobs.batches(engine)
    losses = []
    for _ in range(6):
        losses.append(engine.train_batch(data).item())
        if interrupt:
            engine.eval_batch(jobs.batches(engine, start=99))
            engine.save_checkpoint(folder)
    return losses


def test_evaluating_and_saving_change_nothing(tmp_path):
    assert run_ranks(interrupted, 2, str(tmp_path), True) == run_ranks(
        interrupted, 2, str(tmp_path), False
    )


def logits_and_losses():
    engine = jobs.build({"mode": "local"}, 2)
    loss, logits = engine.eval_batch(jobs.batches(engine, start=7), return_logits=True)
    return loss.item(), logits, engine.eval_losses


def test_evaluation_gives_every_segment_and_logits():
    from reference import GPT2, Reference, batch

    results = run_ranks(logits_and_losses, 2)
    model = Reference("gpt2", [0, 3, 6])
    batches = [batch(7, m, 0) for m in range(4)]
    with torch.no_grad():
        expected = {
            s: sum(model.losses(ids, {0, 1})[s].item() for ids in batches) / 4 for s in (0, 1)
        }
    for loss, _, losses in results:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert loss == pytest.approx(expected[1], rel=1e-5)
    assert results[0][1] is None
    assert results[1][1].shape == (2, 16, GPT2["vocab_size"])


def test_rank_0_reports_every_step_once_and_in_order():
    reports = run_ranks(_report_steps, 3)[0]
    assert reports == list(range(1, 8))


def _report_steps():
    engine = jobs.build({"mode": "local"}, 3)
    steps = []
    engine.reports.listeners.append(lambda rows: steps.append(rows[0].step))
    data = jobs.batches(engine)
    for number in range(7):
        engine.train_batch(data)
        if number == 4:
            engine.eval_batch(jobs.batches(engine))
    engine.reports.flush()
    return steps


def _wait_for_a_slow_stage():
    engine = jobs.build({"mode": "local"}, 3)
    if engine.stage_id == 1:
        forward = engine.module.run_segment
        engine.module.run_segment = lambda *args: (time.sleep(0.3), forward(*args))[1]
    rows = []
    engine.reports.listeners.append(
        lambda reports: rows.append([(r.slowest_link, r.idle_share) for r in reports])
    )
    data = jobs.batches(engine)
    for _ in range(4):
        engine.train_batch(data)
    engine.reports.flush()
    return rows


def test_reports_name_the_link_that_a_stage_waits_for():
    first, slow, last = run_ranks(_wait_for_a_slow_stage, 3)[0][-1]
    assert last[0] == "activation link 1 -> 2"
    assert first[0] in (
        None,
        "activation link 0 -> 1",
    )  # its messages are taken late, if at all within so few steps
    assert slow[1] < last[1]


def run_out_of_data(stages):
    engine = jobs.build({"mode": "local"}, stages)
    data = None if engine.stage_id else iter([jobs.batch(0, m, 0) for m in range(6)])
    began = time.monotonic()
    try:
        for _ in range(3):
            engine.train_batch(data)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "no error", 0


def test_running_out_of_data_ends_every_stage_with_the_reason():
    results = run_ranks(run_out_of_data, 3, 3)
    for number, (message, seconds) in enumerate(results):
        assert "the data ran out at micro-batch 2" in message
        assert seconds < 30
        if number:
            assert "stage 0 (rank 0)" in message


def test_a_module_of_another_configuration_is_refused():
    with pytest.raises(RankError, match="built with another local_parallel section"):
        run_ranks(_two_configurations, 1)


def _two_configurations():
    import ds_local

    module = ds_local.causal_lm(
        jobs.MODELS["gpt2"], num_stages=1, config=jobs.ds_config({"mode": "local"})
    )
    ds_local.initialize(model=module, config=jobs.ds_config({"mode": "backprop"}))


def half_made(missing):
    from unittest import mock

    from ds_local.engine.engine import LocalPipelineEngine
    from ds_local.engine.process_group import end_processes

    with mock.patch.object(LocalPipelineEngine, missing, side_effect=ValueError("no way")):
        try:
            jobs.build({"mode": "local"}, 1)
        except ValueError as error:
            end_processes()
            return str(error)
    return "made"


@pytest.mark.parametrize("missing", ["_look_after_each_other", "_connect", "_make_copies"])
def test_an_engine_whose_making_fails_ends_with_that_failure_alone(missing):
    assert run_ranks(half_made, 1, missing) == ["no way"]


def own_loss(section):
    engine = jobs.build(section, 2)
    loss = engine.train_batch(jobs.batches(engine))
    return tuple(loss.shape), loss.item(), engine.has_loss, sorted(engine.segment_losses)


def test_every_stage_gets_a_tensor_and_says_whether_it_is_a_loss():
    """Interlocking trains the first segment by the second one's loss, and gives it none."""
    first, (shape, loss, *second) = run_ranks(own_loss, 2, {"mode": "interlocking"})
    assert first == ((), 0.0, False, [])
    assert (shape, second) == ((), [True, [1]])
    assert loss > 0
