"""Every row of the table against one-process autograd, and on any number of ranks."""

import itertools

import jobs
import pytest
import torch
from ranks import run_ranks
from reference import Reference, batch, table_of
from samples import sampled

STEPS, FEWER_STEPS = 20, 3
# fp32 rounding, added up over the steps
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def reference_run(family, parts, gas, replicas, steps, tables_of_step, head_weights=None):
    model = Reference(family, parts)
    losses = []
    for step in range(steps):
        micro_batches = [batch(step, m, r) for m in range(gas) for r in range(replicas)]
        tables = [table for table in tables_of_step(step) for _ in range(replicas)]
        losses.append(model.step(micro_batches, tables, head_weights))
    return losses, model.state()


def compare(results, losses, state):
    """Losses as rank 0 reports them, and all parameters, against the reference."""
    for got, expected in zip(results[0]["reports"], losses, strict=True):
        assert {s for s, loss in got.items() if loss is not None} == set(expected)
        for segment, loss in expected.items():
            assert got[segment] == pytest.approx(loss, rel=2e-5)
    seen = set()
    for result in results:
        for name, tensor in result["state"].items():
            torch.testing.assert_close(tensor, state[name], **CLOSE)
            seen.add(name)
    used = {name for name in state if not name.startswith("heads.")}
    assert used <= seen


LOCAL_RUNS = list(
    itertools.product(("gpt2", "llama"), ((2, 1), (3, 1), (4, 1), (2, 2)), (1, 4))
)  # (family, (stages, replicas), M)
LOCAL_SAMPLE = [  # every layout
    ("gpt2", (2, 1), 1),
    ("gpt2", (4, 1), 4),
    ("llama", (3, 1), 1),
    ("llama", (2, 2), 4),
]


@pytest.mark.parametrize(("family", "layout", "gas"), sampled(LOCAL_SAMPLE, LOCAL_RUNS), ids=str)
def test_local_training_equals_segments_trained_by_themselves(family, layout, gas):
    stages, replicas = layout
    steps = STEPS if (family, layout, gas) == ("gpt2", (4, 1), 4) else FEWER_STEPS
    results = run_ranks(
        jobs.train, stages * replicas, {"mode": "local"}, stages, steps, family=family, gas=gas
    )
    table = table_of("local", stages)
    compare(
        results,
        *reference_run(
            family, results[0]["parts"], gas, replicas, steps, lambda step: [table] * gas
        ),
    )


@pytest.mark.parametrize(("stages", "replicas"), sampled([(4, 2)], [(3, 2), (4, 2)]))
def test_local_training_on_many_ranks(stages, replicas):
    results = run_ranks(
        jobs.train, stages * replicas, {"mode": "local"}, stages, FEWER_STEPS, timeout=240
    )
    table = table_of("local", stages)
    compare(
        results,
        *reference_run(
            "gpt2", results[0]["parts"], 4, replicas, FEWER_STEPS, lambda step: [table] * 4
        ),
    )


ROWS = [
    {"mode": "backprop"},
    {"mode": "chunked", "window": 2},
    {"mode": "shifted_chunked", "window": 2},
    {"mode": "overlapping", "window": 2},
    {"mode": "overlapping", "window": 2, "combine": "mean"},
    {"mode": "interlocking", "window": 2},
    {"mode": "deep_supervision"},
    {"mode": "backprop", "split_backward": 1},
    {"mode": "chunked", "window": 2, "split_backward": 2},
]
DEEP_ROWS = [
    {"mode": "overlapping", "window": 3},
    {"mode": "overlapping", "window": 3, "combine": "mean"},
    {"mode": "overlapping", "window": 3, "split_backward": 1},
    {"mode": "interlocking", "window": 3},
    {"mode": "deep_supervision", "weights": [0.1, 0.2, 0.3, 1.0]},
    {"mode": "deep_supervision", "weights": [0.0, 0.5, 0.0, 1.0]},
]


def name_of(row):
    return "-".join(map(str, row.values())) if isinstance(row, dict) else None


# each on one number of stages, on which it is not another row; the wide ones are on 4
STAGES = [2, 3, 4, 4, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("row", "stages"),
    sampled([*zip(ROWS, STAGES, strict=True)], [*itertools.product(ROWS, (2, 3, 4))]),
    ids=name_of,
)
def test_row_equals_one_process_autograd(row, stages):
    check_row(row, stages)


@pytest.mark.parametrize("row", sampled(DEEP_ROWS[1::2], DEEP_ROWS), ids=name_of)
def test_wide_row_equals_one_process_autograd(row):
    check_row(row, 4)


def check_row(row, stages, steps=FEWER_STEPS):
    results = run_ranks(jobs.train, stages, row, stages, steps)
    arguments = {key: row[key] for key in ("window", "combine", "weights") if key in row}

    def tables_of_step(step):
        return [table_of(row["mode"], stages, step=step, **arguments)] * 4

    heads = dict(enumerate(row["weights"])) if "weights" in row else None
    compare(
        results, *reference_run("gpt2", results[0]["parts"], 4, 1, steps, tables_of_step, heads)
    )


@pytest.mark.parametrize("backprop", [1, 2, 3])
def test_mixed_micro_batches_add_up_like_one_process(backprop):
    section = {"mix": [{"mode": "backprop", "micro_batches": backprop}, {"mode": "local"}]}
    results = run_ranks(jobs.train, 4, section, 4, FEWER_STEPS)
    # the backprop micro-batches are the first ones read as long as there are no more of them than
    # stages
    tables = [table_of("backprop", 4)] * backprop + [table_of("local", 4)] * (4 - backprop)
    compare(
        results,
        *reference_run("gpt2", results[0]["parts"], 4, 1, FEWER_STEPS, lambda step: tables),
    )


def test_corrected_micro_batches_add_up_like_one_process():
    section = {
        "mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}],
        "correction": 0.5,
    }
    results = run_ranks(jobs.train, 4, section, 4, FEWER_STEPS)
    own = {s: {s: -1.5} for s in range(3)}
    tables = [own | {3: {0: 2.5, 1: 2.5, 2: 2.5, 3: 1.0}}] + [table_of("local", 4)] * 3
    compare(
        results,
        *reference_run("gpt2", results[0]["parts"], 4, 1, FEWER_STEPS, lambda step: tables),
    )


def test_mix_of_one_row_is_that_row():
    for mode in ("backprop", "local"):
        plain = run_ranks(jobs.train, 2, {"mode": mode}, 2, 2)
        mixed = run_ranks(jobs.train, 2, {"mix": [{"mode": mode}]}, 2, 2)
        assert plain[0]["reports"] == mixed[0]["reports"]


def test_phases_change_the_table_on_all_stages_at_once():
    section = {
        "phases": [
            {"until_step": 3, "mode": "local"},
            {"until_step": 5, "mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}]},
            {"mode": "interlocking", "window": 2},
        ]
    }

    def tables_of_step(step):
        if step < 3:
            return [table_of("local", 4)] * 4
        if step < 5:
            return [table_of("backprop", 4)] * 2 + [table_of("local", 4)] * 2
        return [table_of("interlocking", 4)] * 4

    results = run_ranks(jobs.train, 4, section, 4, 8)
    compare(results, *reference_run("gpt2", results[0]["parts"], 4, 1, 8, tables_of_step))


MIXES = [
    {"mix": [{"mode": "backprop", "micro_batches": "auto"}, {"mode": "local"}]},
    {"mix": [{"mode": "backprop", "micro_batches": 3}, {"mode": "interlocking"}]},
    {"mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "chunked"}], "correction": 1.0},
    {
        "phases": [
            {"until_step": 2, "mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}]},
            {"mode": "backprop"},
        ]
    },
    {"phases": [{"until_step": 2, "mode": "local"}, {"mode": "backprop"}], "cycle_steps": 3},
    {"mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}], "split_backward": 2},
    {
        "mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "chunked"}],
        "correction": 1.0,
        "split_backward": 1,
    },
]


ANY_RANKS = [{"mode": "local"}, *ROWS, *DEEP_ROWS, *MIXES]
# what goes beyond one of those that are left in nothing that ranks could change
ALIKE = [ROWS[n] for n in (0, 1, 3, 5, 6)] + [DEEP_ROWS[n] for n in (0, 1, 3, 4)]
ALIKE += [MIXES[n] for n in (0, 2, 5)]


@pytest.mark.parametrize(
    "section",
    sampled([section for section in ANY_RANKS if section not in ALIKE], ANY_RANKS),
    ids=str,
)
def test_four_segments_give_the_same_bits_on_1_2_and_4_ranks(section):
    steps = 4 if "phases" in section else 2
    runs = [
        run_ranks(jobs.train, ranks, {**section, "segments_per_stage": 4 // ranks}, ranks, steps)
        for ranks in (1, 2, 4)
    ]
    reference = runs[0]
    for other in runs[1:]:
        assert other[0]["reports"] == reference[0]["reports"]
        assert other[0]["eval"] == reference[0]["eval"]
        merged = {name: tensor for result in other for name, tensor in result["state"].items()}
        assert set(merged) == set(reference[0]["state"])
        assert all(
            torch.equal(merged[name], tensor) for name, tensor in reference[0]["state"].items()
        )


def test_dropout_gives_the_same_bits_on_1_and_4_ranks():
    model = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}
    runs = [
        run_ranks(
            jobs.train, r, {"mode": "overlapping", "segments_per_stage": 4 // r}, r, 3, model=model
        )
        for r in (1, 4)
    ]
    assert runs[0][0]["reports"] == runs[1][0]["reports"]
    without = run_ranks(jobs.train, 1, {"mode": "overlapping", "segments_per_stage": 4}, 1, 3)
    assert without[0]["reports"] != runs[0][0]["reports"]


@pytest.mark.parametrize("seed", sampled(range(4), range(30)))
def test_random_rows_run_on_real_ranks_as_on_one(seed):
    """Modes, windows, mixes, stages, segments per stage and link depths at random: no hang, and the
    bits of one rank."""
    import random

    from test_list_scheduler import random_case

    from ds_local.errors import ScheduleError
    from ds_local.schedules.list_scheduler import make_schedule
    from ds_local.schedules.replay import validate

    rng = random.Random(seed)
    parts, stages = random_case(rng)
    while (
        stages not in (2, 4)
        or parts[0][0].num_segments != 4
        or sum(count for _, count in parts) < 2
    ):
        parts, stages = random_case(rng)
    depth = rng.randint(1, 4)
    split = rng.choice([0, 1, 2])
    schedule = make_schedule(parts, stages, 0.0, split)
    gas = schedule.num_micro_batches
    try:
        validate(schedule, depth)
    except ScheduleError:  # more on their way than the links take
        depth = gas
    entries = [_entry(routes, count) for routes, count in parts if count]
    section = {
        "mix": entries,
        "link": {"depth": depth, "timeout_seconds": 60},
        "split_backward": split,
    }
    real = run_ranks(
        jobs.train, stages, {**section, "segments_per_stage": 4 // stages}, stages, 2, gas=gas
    )
    alone = run_ranks(jobs.train, 1, {**section, "segments_per_stage": 4}, 1, 2, gas=gas)
    assert real[0]["reports"] == alone[0]["reports"]
    assert all(result["live"] == 0 for result in real)


def _entry(routes, count):
    mode, _, window = routes.mode.partition("(")
    entry = {"mode": mode, "micro_batches": count}
    if window:
        size, _, mean = window.rstrip(")").partition(", ")
        entry |= {"window": int(size)} | ({"combine": "mean"} if mean else {})
    if mode == "deep_supervision":
        entry["weights"] = [
            routes.loss_weights.get(loss, 0.0) for loss in range(routes.num_segments)
        ]
    return entry
