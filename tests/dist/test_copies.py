"""Heads that copy weights of other segments: at the promised step, by the formula, the same on any
number of ranks."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import torch
from ranks import run_ranks
from samples import sampled

HEAD = {
    "readout": "shared",
    "blocks": 1,
    "blocks_from": "next_tracked",
    "refresh_every": 2,
    "tracking": 0.75,
}
CHEAP = {"token_fraction": 0.5, "temperature": True, "every": 2, "rank": 8}
STEPS = 14


def follow(section: dict[str, Any], stages: int, steps: int) -> Any:
    """Source and copy of every copied weight after every step."""
    engine = jobs.build(section, stages, gas=4)
    data = jobs.batches(engine)
    seen = []
    for _ in range(steps):
        engine.train_batch(data)
        seen.append(
            {
                str(copy): tuple(
                    [t.detach().clone() for t in engine.module.copied_tensors(copy, end)]
                    for end in ("source", "target")
                )
                for copy in engine.module.copies
            }
        )
    return engine.copies.delay, seen


def test_copies_follow_the_formula_at_the_promised_step():
    delay, seen = run_ranks(follow, 1, {"segments_per_stage": 4, "head": HEAD}, 1, STEPS)[0]
    assert delay == 7
    names = list(seen[0])
    assert sum("readout" in name for name in names) == 3
    assert sum("blocks" in name for name in names) == 3
    for name in names:
        expected = seen[0][name][1]
        for step in range(1, STEPS):  # seen[step] is the state after step + 1 optimizer steps
            due = step - delay
            if due > 0 and due % 2 == 0:
                keep = 0.75 if "blocks" in name else 0.0
                sent = seen[due - 1][name][0]
                expected = [
                    keep * old + (1 - keep) * new for old, new in zip(expected, sent, strict=True)
                ]
            for got, wanted in zip(seen[step][name][1], expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert any(
        not torch.equal(a, b)
        for name in names
        for a, b in zip(seen[0][name][1], seen[-1][name][1], strict=True)
    )


HEADS = {"copied": HEAD, "cheap": CHEAP}
ROWS = {
    "local": {"mode": "local"},
    "mixed": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
}


@pytest.mark.parametrize(
    ("head", "row"),
    sampled(  # copies travel beside what a row sends, cheap heads send nothing
        [("copied", "mixed"), ("cheap", "local")],
        [(head, row) for head in HEADS for row in ROWS],
    ),
)
def test_heads_give_the_same_bits_on_1_2_and_4_ranks(head, row):
    # the first copies count from step 10 on
    steps, section = 12 if head == "copied" else 4, {**ROWS[row], "head": HEADS[head]}
    runs = [
        run_ranks(jobs.train, r, {**section, "segments_per_stage": 4 // r}, r, steps)
        for r in (1, 2, 4)
    ]
    assert runs[0][0]["reports"] == runs[1][0]["reports"] == runs[2][0]["reports"]
    plain = run_ranks(jobs.train, 1, {**ROWS[row], "segments_per_stage": 4}, 1, steps)
    assert runs[0][0]["reports"] != plain[0]["reports"]


def resume(section: dict[str, Any], stages: int, folder: str) -> Any:
    """Losses of the last steps, without and with a checkpoint in between."""

    def losses(engine, steps):
        data = jobs.batches(engine, start=engine.global_steps)
        return [engine.train_batch(data).item() for _ in range(steps)]

    engine = jobs.build(section, stages)
    losses(engine, 9)
    engine.save_checkpoint(folder)
    expected = losses(engine, 9)
    again = jobs.build(section, stages)
    again.load_checkpoint(folder)
    resumed = losses(again, 9)
    engine.load_checkpoint(folder)  # into an engine with copies of later steps under way
    reloaded = losses(engine, 9)
    torch.distributed.barrier()  # nobody leaves while another still receives
    return expected, resumed, reloaded


@pytest.mark.parametrize("ranks", sampled([2], [1, 2]))
def test_copies_under_way_survive_a_resume(ranks, tmp_path):
    section = {"segments_per_stage": 4 // ranks, "head": HEAD}
    for expected, resumed, reloaded in run_ranks(resume, ranks, section, ranks, str(tmp_path)):
        assert expected == resumed == reloaded


def with_factors(section: dict[str, Any], extra: dict[str, Any]) -> Any:
    engine = jobs.build(section, 2, **extra)
    data = jobs.batches(engine)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.train_batch(data)
    moved = {
        name: (p.detach() - before[name]).abs().max().item()
        for name, p in engine.module.named_parameters()
    }
    return moved, [group["lr"] for group in engine.optimizer.param_groups]


@pytest.mark.parametrize(
    ("extra", "tolerance"),
    [({}, 0.05), ({"zero_optimization": {"stage": 1}}, 0.05), ({"bf16": {"enabled": True}}, 0.3)],
    ids=["fp32", "zero1", "bf16"],
)
def test_learning_rate_factors_scale_the_first_adam_step(extra, tolerance):
    plain = run_ranks(with_factors, 2, {"segments_per_stage": 2}, extra)
    scaled = run_ranks(
        with_factors, 2, {"segments_per_stage": 2, "lr_multipliers": [1, 0.5, 1, 0.25]}, extra
    )
    for stage, ((before, _), (after, rates)) in enumerate(zip(plain, scaled, strict=True)):
        assert rates == [0.01, 0.01]  # what schedulers and logs see stays
        ratios = {name: after[name] / before[name] for name in before if before[name] > 5e-3}
        expected = [1.0, 0.5] if stage == 0 else [1.0, 0.25]
        nearest = {
            name: min(expected, key=lambda factor: abs(ratio - factor))
            for name, ratio in ratios.items()
        }
        assert set(nearest.values()) == set(expected)
        assert all(abs(ratios[name] - factor) < tolerance for name, factor in nearest.items())


def test_clipping_factors_scale_each_segments_gradient():
    plain = run_ranks(norms, 2, {"segments_per_stage": 2})
    scaled = run_ranks(norms, 2, {"segments_per_stage": 2, "clip_multipliers": [1, 0.5, 2, 1]})
    flat = [
        dict(sorted({s: n for result in run for s, n in result.items()}.items()))
        for run in (plain, scaled)
    ]
    assert list(flat[0].values()) == pytest.approx([0.01] * 4, rel=1e-3)
    assert list(flat[1].values()) == pytest.approx([0.01, 0.005, 0.02, 0.01], rel=1e-3)


def norms(section: dict[str, Any]) -> dict[int, float]:
    """The gradient norm that is left of each segment after clipping to 0.01."""
    engine = jobs.build(section, 2, gradient_clipping=0.01)
    left: dict[int, float] = {}

    def keep(*_: Any) -> None:
        for segment in engine.module.local_segments:
            grads = [
                p.grad.norm()
                for p in engine.module.segment_parameters(segment)
                if p.grad is not None
            ]
            left[segment] = torch.stack(grads).norm().item()

    engine.basic_optimizer.register_step_pre_hook(keep)
    engine.train_batch(jobs.batches(engine))
    return left


def diagnose(section: dict[str, Any], stages: int) -> Any:
    """Figures of one probe, and the losses of steps before and after it."""
    from reference import batch

    from ds_local.training import diagnostics

    engine = jobs.build({**section, "diagnostics": True}, stages)
    data = jobs.batches(engine)
    losses = [engine.train_batch(data) for _ in range(2)]
    figures = diagnostics.probe(engine, batch(77, 0, 0) if engine.is_first_stage() else None)
    losses += [engine.train_batch(data) for _ in range(2)]
    return figures, [loss.item() for loss in losses if loss is not None]


def test_diagnostics_are_the_cosines_of_one_process_autograd_and_change_nothing():
    from reference import Reference, batch, table_of

    section = {"mode": "local", "segments_per_stage": 4}
    figures, losses = run_ranks(diagnose, 1, section, 1)[0]
    model = Reference("gpt2", [0, 2, 3, 4, 6])
    for step in range(2):
        model.step([batch(step, m, 0) for m in range(4)], [table_of("local", 4)] * 4)
    ids = batch(77, 0, 0)
    ids = ids[0] if isinstance(ids, tuple) else ids
    hidden, local, true = ids, [], []
    layers = [[p for layer in segment for p in layer.parameters()] for segment in model.segments]
    whole = model.losses(ids, {3})[3]
    for s, segment in enumerate(model.segments):
        if s < 3:
            start = hidden if s == 0 else hidden.detach()
            for layer in segment:
                start = layer(start)
            hidden, loss = start, model.heads[s](start, ids)
            local.append(torch.autograd.grad(loss, layers[s], retain_graph=True))
        true.append(torch.autograd.grad(whole, layers[s], retain_graph=True, allow_unused=True))
    for s in range(3):
        flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (local[s], true[s])]
        assert figures[s]["gradient_cosine"] == pytest.approx(
            torch.cosine_similarity(*flat, dim=0).item(), abs=1e-3
        )
    assert figures[3]["gradient_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert all(
        f["activation_norm"] > 0 and 1 <= f["activation_rank"] <= 30 for f in figures.values()
    )

    plain = run_ranks(jobs.train, 1, section, 1, 4)[0]["own"]
    assert losses == plain
    assert run_ranks(diagnose, 2, {"mode": "local", "segments_per_stage": 2}, 2)[1] == (
        figures,
        losses,
    )


def ended(stages: int) -> list[str]:
    """What is said where a script ends while weights are on their way to a head."""
    engine = jobs.build({"head": HEAD}, stages, gas=4)
    data = jobs.batches(engine)
    for _ in range(3):
        engine.train_batch(data)
    engine.destroy()
    return [str(copy) for copy in engine.module.copies]


def test_an_engine_may_end_while_copies_are_on_their_way():
    assert len(run_ranks(ended, 2, 2)[0]) == 2
