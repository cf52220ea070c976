"""A NaN or an infinity anywhere: its stage is named, its update left out, and all else goes on."""

import os
import re
from itertools import pairwise

import jobs
import pytest
from ranks import run_ranks
from reference import table_of
from samples import sampled

STAGES = 4
ROWS = {
    "local": {"mode": "local"},
    "chunked": {"mode": "chunked", "window": 2},
    "overlapping": {"mode": "overlapping", "window": 2},
    "interlocking": {"mode": "interlocking", "window": 2},
    "backprop": {"mode": "backprop"},
    "mix": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
}
KINDS = ("activation", "loss", "gradient")
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, ZeRO-1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "fp32, ZeRO-1": {"zero_optimization": {"stage": 1}},
}
SCHEDULER = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 1e-3, "warmup_num_steps": 1000, "warmup_type": "linear"},
}


# --- what is injected ---------------------------------------------------------------------------


def inject(engine, plan, value=float("nan")):
    """`plan`: (step, kind, segment, micro-batch) of numbers that go bad, on replica 0. A gradient
    goes bad at the end of the segment, on its way down."""
    import torch

    class SpoilGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * value

    plan = set(plan) if engine.replica_id == 0 else set()
    executor, module = engine.executor, engine.module
    now = {}

    def noted(run):
        def noting(segment, micro_batch, **which):
            now["micro_batch"] = micro_batch
            return run(segment, micro_batch, **which)

        return noting

    executor.forward_pass = noted(executor.forward_pass)
    executor.gradient_pass = noted(executor.gradient_pass)

    def goes_bad(kind, segment):
        return (executor.step, kind, segment, now.get("micro_batch")) in plan

    run_segment, loss_of = module.run_segment, module.loss_of

    def run(segment, inputs):
        hidden = run_segment(segment, inputs)
        if goes_bad("activation", segment):
            hidden = torch.cat([hidden[..., :-1], hidden[..., -1:] * value], dim=-1)
        if goes_bad("gradient", segment) and hidden.requires_grad:
            hidden = SpoilGradient.apply(hidden)
        return hidden

    def loss(segment, *given):
        return loss_of(segment, *given) * (value if goes_bad("loss", segment) else 1.0)

    module.run_segment, module.loss_of = run, loss


def everything(engine):
    """Copies of this rank's weights, masters and moments, by name."""
    tensors = {name: p.detach() for name, p in engine.module.named_parameters()}
    for number, group in enumerate(engine.basic_optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            state = engine.basic_optimizer.state.get(parameter, {})
            kept = {"master": parameter.detach(), **state}
            tensors |= {f"{number}.{index}.{key}": value for key, value in kept.items()}
    return {name: tensor.clone() for name, tensor in tensors.items() if hasattr(tensor, "clone")}


def observe(section, stages, plan, steps, value=float("nan"), **extra):
    """Per step of a run into which `plan` is injected: did weights and moments change, are they
    finite, what was noticed, what does the learning rate say."""
    import torch

    engine = jobs.build(section, stages, scheduler=SCHEDULER, **extra)
    inject(engine, plan, value)
    told, reports, seen = [], [], []
    engine.events.say = told.append
    engine.reports.listeners.append(reports.append)
    data = jobs.batches(engine)
    for _ in range(steps):
        before = everything(engine)
        engine.train_batch(data)
        after = everything(engine)
        seen.append(
            {
                # an optimizer makes its moments in its first step
                "same": [n for n in before if torch.equal(before[n], after[n])] == list(after),
                "weights": {
                    segment: all(
                        torch.equal(before[n], after[n])
                        for n, p in engine.module.named_parameters()
                        if any(p is q for q in engine.module.segment_parameters(segment))
                    )
                    for segment in engine.module.local_segments
                },
                "finite": all(t.isfinite().all() for t in after.values()),
                "events": {
                    s: e for s, e in engine.events.newest.items() if e[1] == engine.global_steps
                },
                "lr": engine.get_lr()[0],
                "skipped": engine.skipped_steps,
                "steps": (engine.global_steps, engine.global_samples),
                "loss": {s: loss.item() for s, loss in engine.segment_losses.items()},
            }
        )
    engine.reports.flush()
    return {
        "stage": engine.stage_id,
        "replica": engine.replica_id,
        "seen": seen,
        "told": told,
        "state": jobs.state_of(engine),
        "reports": [[(r.nonfinite, r.nonfinite_step, r.skipped) for r in rows] for rows in reports],
    }


# --- what must come of it -----------------------------------------------------------------------


def expected(row, kind, segment, num_segments=STAGES):
    """segment -> kind of event, from which loss trains which segment."""
    mode = "backprop" if row == "mix" else row  # micro-batch 0 of the mix
    table = table_of(mode, num_segments)
    if kind == "activation":
        reached = {t for loss, trained in table.items() if loss >= segment for t in trained}
        above = set(range(segment + 1, num_segments))
        # a head's loss is computed, and its weights learn, even where it trains nobody else
        found = dict.fromkeys(above, "from_below") | {segment: "activation"}
        return found | {t: "from_above" for t in reached if t < segment}
    if kind == "loss":
        if segment not in table:
            return {}
        return {t: "from_above" for t in table[segment] if t != segment} | {segment: "loss"}
    passed = {
        t for loss, trained in table.items() if loss >= segment for t in trained if t < segment
    }
    return dict.fromkeys(passed, "from_above") | {segment: "gradient"}


def cases():
    """One engine runs through all rows, in each through all kinds and segments, now and then a step
    in which all is well."""
    return [
        (row, *case)
        for row in ROWS
        for kind in KINDS
        for case in [*((kind, segment) for segment in range(STAGES)), (None, 0)]
    ]


def phases():
    length = len(cases()) // len(ROWS)
    ends = [length * (i + 1) for i in range(len(ROWS) - 1)]
    return [row | {"until_step": end} for row, end in zip(ROWS.values(), ends, strict=False)] + [
        [*ROWS.values()][-1]
    ]


@pytest.mark.parametrize(
    ("precision", "stages", "replicas"),
    sampled(  # an optimizer of DeepSpeed, which shares out among two
        [("bf16, ZeRO-1", 2, 2)],
        [(precision, *layout) for precision in PRECISIONS for layout in ((4, 1), (2, 2))],
    ),
)
def test_every_kind_at_every_stage_in_every_row(precision, stages, replicas):
    check_all_cases(precision, stages, replicas)


def check_all_cases(precision, stages, replicas):
    plan = [(step, kind, segment, 0) for step, (_, kind, segment) in enumerate(cases()) if kind]
    section = {
        "phases": phases(),
        "segments_per_stage": STAGES // stages,
        "on_nonfinite": {"skip": 99},
    }
    results = run_ranks(
        observe,
        stages * replicas,
        section,
        stages,
        plan,
        len(cases()),
        gas=2,
        timeout=280,
        **PRECISIONS[precision],
    )
    skipped = dict.fromkeys(range(stages), 0)
    for step, (row, kind, segment) in enumerate(cases()):
        events = expected(row, kind, segment) if kind else {}
        at = f"step {step}: {kind} of segment {segment} in {row}, {precision}"
        for result in results:
            seen, stage = result["seen"][step], result["stage"]
            own = {s: (k, step + 1) for s, k in events.items() if s // (STAGES // stages) == stage}
            assert seen["events"] == own, at
            assert seen["finite"], at
            assert seen["same"] is (
                set(seen["weights"]) == set(own) if precision == "fp32" else bool(own)
            ), at
            if precision == "fp32":  # a segment at a time
                assert {s for s, same in seen["weights"].items() if same} == set(own), at
            assert seen["steps"] == (step + 1, (step + 1) * 4 * replicas), at
            if result["replica"] == 0:
                skipped[stage] += bool(own)
            assert seen["skipped"] == skipped[stage], at
        assert len({result["seen"][step]["lr"] for result in results}) == 1, at
    lrs = [seen["lr"] for seen in results[0]["seen"]]
    assert all(a < b for a, b in pairwise(lrs))  # no step of the schedule is lost
    for step, rows in enumerate(results[0]["reports"]):
        row, kind, segment = cases()[step]
        events = expected(row, kind, segment) if kind else {}
        assert [r[:2] for r in rows] == [
            (events[s], step + 1) if s in events else (None, None) for s in range(STAGES)
        ]
        assert [r[2] for r in rows] == [
            result["seen"][step]["skipped"]
            for result in results
            if result["replica"] == 0
            for _ in range(STAGES // stages)
        ]


def test_an_infinity_in_a_later_micro_batch():
    plan = [(1, "loss", 0, 1), (2, "activation", 0, 1), (3, "gradient", 1, 0), (4, "loss", 1, 1)]
    results = run_ranks(observe, 2, ROWS["mix"], 2, plan, 6, float("inf"), gas=2)
    seen = {
        (step, s): e
        for r in results
        for step in range(6)
        for s, e in r["seen"][step]["events"].items()
    }
    assert seen == {
        (1, 0): ("loss", 2),  # micro-batch 1 is of the local row
        (2, 0): ("activation", 3), (2, 1): ("from_below", 3),
        (3, 0): ("from_above", 4), (3, 1): ("gradient", 4),  # micro-batch 0 is of backprop
        (4, 1): ("loss", 5),
    }  # fmt: skip
    assert all(s["finite"] for r in results for s in r["seen"])
    assert results[0]["seen"][1]["loss"][0] == float("inf")  # the loss itself is told as it is


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16, ZeRO-1", marks=pytest.mark.slow)]
)
def test_a_gradient_too_large_to_square_would_ruin_the_moments(precision):
    results = run_ranks(
        observe,
        2,
        {"mode": "local"},
        2,
        [(1, "gradient", 1, 0)],
        3,
        1e30,
        gas=2,
        **PRECISIONS[precision],
    )
    assert results[1]["seen"][1]["events"] == {1: ("gradient", 2)}
    assert results[1]["seen"][1]["same"]
    assert not results[0]["seen"][1]["events"]
    assert all(s["finite"] for r in results for s in r["seen"])


@pytest.mark.parametrize(("every", "bad"), [(1, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("sync", ["periodic", pytest.param("subnets", marks=pytest.mark.slow)])
def test_replicas_that_train_apart_skip_alone(sync, every, bad):
    section = {"mode": "local", "replicas": {"sync": sync, "every": every}}
    results = run_ranks(observe, 2, section, 1, [(bad, "loss", 0, 0)], 6, gas=2)
    first, second = results
    assert first["seen"][bad]["events"] == {0: ("loss", bad + 1)}
    assert "stage 0, replica 0: the loss of segment 0 was not finite" in first["told"][0]
    assert not any(step["events"] for step in second["seen"])
    assert not second["told"]
    assert all(step["finite"] for result in results for step in result["seen"])
    if sync == "periodic":  # they have just met
        assert all(first["state"][n].equal(t) for n, t in second["state"].items())


def test_what_is_told_names_step_stage_segment_and_count():
    results = run_ranks(
        observe, 2, {"mode": "backprop"}, 2, [(1, "loss", 1, 0), (3, "loss", 1, 0)], 4, gas=2
    )
    rest = "not finite; its update is left out, the {} on this stage"
    assert results[1]["told"] == [
        f"step 2, stage 1: the loss of segment 1 was {rest.format('1st')}",
        f"step 4, stage 1: the loss of segment 1 was {rest.format('2nd')}",
    ]
    assert results[0]["told"][1] == (
        f"step 4, stage 0: the gradient that segment 0 got from above was {rest.format('2nd')}"
    )


def points_of_a_monitor(steps):
    """What DeepSpeed's monitor is given, in order: (tag, value, samples)."""
    engine = jobs.build(
        {"mode": "interlocking"},
        2,
        gas=2,
        scheduler=SCHEDULER,
        steps_per_print=2,
        csv_monitor={
            "enabled": True,
            "output_path": os.environ.get("TMPDIR", "/tmp") + "/ds_local_monitor",
            "job_name": "x",
        },
    )
    points = []
    engine.monitor.write_events = points.extend
    inject(engine, [(2, "loss", 1, 0)])
    data = jobs.batches(engine)
    for _ in range(steps):
        engine.train_batch(data)
    engine.reports.flush()
    return points


def test_a_monitor_gets_every_point_once_and_steps_in_order(tmp_path, monkeypatch):
    import math

    points, none = run_ranks(points_of_a_monitor, 2, 7)
    assert not none
    samples = [at for *_, at in points]
    assert samples == sorted(samples)  # learning rates too
    assert len({(tag, at) for tag, _, at in points}) == len(points)
    assert set(samples) == {4 * step for step in (2, 4, 6, 7)}
    found = {(tag, at): value for tag, value, at in points}
    assert found["Train/stage_1/segment_1/skipped", 8] == 0 or math.isnan(
        found["Train/Samples/train_loss", 12]
    )
    assert (
        found["Train/stage_1/segment_1/skipped", 16]
        == found["Train/stage_0/segment_0/skipped", 16]
        == 1
    )
    assert found["Train/Samples/lr", 16] > found["Train/Samples/lr", 8] > 0
    assert ("Train/stage_0/segment_0/loss", 16) not in found  # it has no loss in this row


# --- checkpoints --------------------------------------------------------------------------------


def save_and_load(folder, where):
    """Sentences of a save and of a load of numbers that are not finite on stage 1, and what is in
    the folder after them."""
    import pathlib

    import torch

    from ds_local.engine import saving
    from ds_local.errors import CheckpointError

    engine = jobs.build({"mode": "local"}, 2, gas=2)
    data = jobs.batches(engine)
    engine.train_batch(data)
    engine.save_checkpoint(folder)
    if engine.stage_id == 1:
        parameter = next(engine.module.parameters())
        bad = parameter if where == "weights" else engine.optimizer.state[parameter]["exp_avg_sq"]
        with torch.no_grad():
            bad.view(-1)[3] = float("inf")
    said = []
    try:
        engine.save_checkpoint(folder, tag="bad")
    except CheckpointError as error:
        said.append(str(error))
    found = (
        sorted(p.name for p in pathlib.Path(folder).iterdir()),
        pathlib.Path(folder, "latest").read_text(),
    )
    check, saving.check_weights_finite = saving.check_weights_finite, lambda *_: None
    engine.save_checkpoint(folder, tag="bad")  # as an older version would
    saving.check_weights_finite = check
    engine.load_checkpoint(folder, tag="global_step1")
    try:
        engine.load_checkpoint(folder, tag="bad")
    except CheckpointError as error:
        said.append(str(error))
    return said, found


@pytest.mark.parametrize("where", ["weights", "moments"])
def test_neither_saved_nor_loaded(tmp_path, where):
    results = run_ranks(save_and_load, 2, str(tmp_path), where)
    for said, (names, latest) in results:
        assert len(said) == 2
        what = r"\S+" if where == "weights" else "the optimizer's exp_avg_sq"
        assert re.search(
            r"bad is not written: stage 1 \(rank 1\) holds numbers that are not finite in "
            rf"{what}.*; what was saved before stays",
            said[0],
        )
        assert re.search(
            r"with \S+/bad stage 1 \(rank 1\) holds .*; use another checkpoint", said[1]
        )
        assert (names, latest) == (["global_step1", "latest"], "global_step1")


# --- running statistics ---------------------------------------------------------------------------


def with_statistics(folder):
    """Losses of an evaluation after a step that is left out, and what a save says of statistics
    that are not numbers."""
    import functools

    import nets
    import torch
    from torch import nn

    import ds_local

    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "local_parallel": {"mode": "local", "segments_per_stage": 2},
    }
    module = ds_local.LocalPipelineModule(
        layers,
        1,
        loss_fn=lambda outputs, labels: (outputs - labels).square().mean(),
        head=functools.partial(nets.Head, "one tensor"),
        config=config,
        parts=[0, 2, 4],
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    bad = (torch.full((4, 6), torch.nan), torch.zeros(4, 6))
    for batch in (nets.data(0, 0), bad, nets.data(1, 0)):
        engine.train_batch(iter([batch]))
    engine.eval_batch(iter([nets.data(2, 0)]))
    losses = list(engine.eval_losses.values())
    layers[1].running_mean.fill_(torch.nan)
    try:
        engine.save_checkpoint(folder)
    except ds_local.DsLocalError as error:
        return losses, engine.skipped_steps, str(error)


def test_running_statistics_outlive_a_step_that_is_left_out(tmp_path):
    losses, skipped, said = run_ranks(with_statistics, 1, str(tmp_path / "run"))[0]
    assert skipped == 1
    assert all(0 < loss < 10 for loss in losses)
    assert "not finite in 1.running_mean" in said
    assert not (tmp_path / "run" / "latest").exists()
