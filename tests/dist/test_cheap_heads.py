"""Heads for the frequent part of the vocabulary, and heads with a companion: against one-process
autograd, on any number of ranks, through a checkpoint."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import torch
from ranks import RankError, run_ranks
from reference import Reference, batch, table_of
from samples import sampled
from test_rows import compare

from ds_local.config.sections import HeadConfig

COUNTS = [(7 * token) % 64 for token in range(64)]  # not in the order of the ids
FREQUENT = {"vocabulary": 8}
FORESEES = {"companion": 0.5}
SAMPLED = {"companion": 0.5, "token_fraction": 0.5}
BOTH = {**SAMPLED, **FREQUENT, "rank": 8}
DRAWN = {**FREQUENT, "rare_samples": 4, "token_fraction": 0.5}
STEPS = 4
HEADS = {
    "frequent": FREQUENT,
    "companion": FORESEES,
    "sampled": SAMPLED,
    "both": BOTH,
    "drawn": DRAWN,
}
FAMILIES = {"local": "gpt2", "chunked": "llama", "overlapping": "gpt2"}


@pytest.mark.parametrize(
    ("mode", "head"),
    sampled(  # every head, and both families
        [("overlapping", "companion"), ("chunked", "frequent")],
        [(mode, head) for mode in FAMILIES for head in ("frequent", "companion")],
    ),
)
def test_a_run_equals_one_process_autograd(mode, head):
    family, head = FAMILIES[mode], HEADS[head]
    settings = {"family": family, "token_counts": COUNTS}
    results = run_ranks(jobs.train, 4, {"mode": mode, "head": head}, 4, STEPS, **settings)
    counts = torch.tensor(COUNTS)
    model = Reference(family, results[0]["parts"], head=HeadConfig(**head), counts=counts)
    tables = [table_of(mode, 4)] * 4
    losses = [model.step([batch(s, m, 0) for m in range(4)], tables) for s in range(STEPS)]
    compare(results, losses, model.state())


ROWS = {
    "local": {"mode": "local"},
    "ahead": {"mode": "chunked", "run_ahead": "auto"},
    "mixed": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
}


@pytest.mark.parametrize(
    ("name", "head"),
    sampled(  # all that a head can have
        [("local", "both"), ("ahead", "both"), ("mixed", "both"), ("local", "drawn")],
        [(row, head) for row in ROWS for head in ("frequent", "sampled", "both", "drawn")],
    ),
)
def test_the_same_bits_on_1_2_and_4_ranks(name, head):
    row = ROWS[name]
    section = {**row, "head": HEADS[head]}
    runs = [
        run_ranks(
            jobs.train, r, {**section, "segments_per_stage": 4 // r}, r, STEPS, token_counts=COUNTS
        )
        for r in (1, 2, 4)
    ]
    assert runs[0][0]["reports"] == runs[1][0]["reports"] == runs[2][0]["reports"]
    assert runs[0][0]["eval"] == runs[1][0]["eval"] == runs[2][0]["eval"]
    plain = run_ranks(jobs.train, 1, {**row, "segments_per_stage": 4}, 1, STEPS)
    assert runs[0][0]["reports"] != plain[0]["reports"]


@pytest.mark.parametrize("interval", [1, 2])
def test_recomputed_layers_and_a_split_backward_change_nothing(interval):
    section = {"mode": "chunked", "segments_per_stage": 2, "head": SAMPLED}
    plain = run_ranks(jobs.train, 2, section, 2, STEPS)[0]
    recomputed = run_ranks(jobs.train, 2, section, 2, STEPS, recompute=interval)[0]
    assert recomputed["reports"] == plain["reports"]
    split = run_ranks(jobs.train, 2, {**section, "split_backward": 1}, 2, STEPS)[0]
    for got, expected in zip(split["reports"], plain["reports"], strict=True):
        told = {segment: loss for segment, loss in got.items() if loss is not None}
        assert told == pytest.approx({segment: expected[segment] for segment in told}, rel=1e-5)
        assert len(told) == 2


def resume(section: dict[str, Any], stages: int, folder: str) -> Any:
    """Losses of the last steps without and with a checkpoint, and classes; what resumes is given
    other counts."""

    def losses(engine, steps):
        data = jobs.batches(engine, start=engine.global_steps)
        return [engine.train_batch(data).item() for _ in range(steps)]

    def classes(engine):
        return {s: head.frequent.class_of.tolist() for s, head in engine.module.heads.items()}

    engine = jobs.build(section, stages, token_counts=COUNTS)
    losses(engine, 4)
    engine.save_checkpoint(folder)
    expected = losses(engine, 4)
    again = jobs.build(section, stages, token_counts=COUNTS[::-1])
    before = classes(again)
    again.load_checkpoint(folder)
    resumed = losses(again, 4)
    torch.distributed.barrier()  # nobody leaves while another still receives
    return expected, resumed, classes(engine), before, classes(again)


@pytest.mark.parametrize("extra", [{}, {"ema": 0.9}], ids=["plain", "ema"])
def test_columns_mean_the_same_tokens_after_a_resume_on_other_data(extra, tmp_path):
    section = {"segments_per_stage": 2, "head": BOTH, **extra}
    for expected, resumed, own, before, after in run_ranks(resume, 2, section, 2, str(tmp_path)):
        assert expected == resumed
        assert own == after
        assert not own or before != own


@pytest.mark.parametrize(
    ("head", "counts", "said"),
    [
        (FREQUENT, None, "head.vocabulary is 8.*pass causal_lm token_counts="),
        (FREQUENT, [1.5] * 64, "token_counts must be"),
        (FREQUENT, [1] * 65, "token_counts has 65 entries"),
        (FREQUENT, "/nowhere", "/nowhere is not a complete data folder"),
        ({"vocabulary": 64}, COUNTS, "head.vocabulary is 64.*lower it, or leave it out"),
        (
            {**FREQUENT, "rare_samples": 57},
            COUNTS,
            "rare_samples is 57, and there are 56 tokens beside the 8 of head.vocabulary; lower",
        ),
    ],
)
def test_counts_that_do_not_fit_are_refused(head, counts, said):
    with pytest.raises(RankError, match=said):
        run_ranks(jobs.train, 1, {"segments_per_stage": 4, "head": head}, 1, 1, token_counts=counts)


def test_a_scheme_without_heads_needs_no_counts():
    section = {"mode": "backprop", "segments_per_stage": 4, "head": FREQUENT}
    assert run_ranks(jobs.train, 1, section, 1, 1)[0]["reports"]


def with_own_counts(section: dict[str, Any]) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()
    jobs.build(section, 2, token_counts=[token * (rank == 0) + 1 for token in range(64)])


def test_ranks_that_count_otherwise_are_refused():
    with pytest.raises(RankError, match="token_counts on rank 1 are not those on rank 0"):
        run_ranks(with_own_counts, 2, {"head": FREQUENT})
