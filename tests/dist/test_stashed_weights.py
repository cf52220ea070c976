"""Forwards that run ahead against one process that keeps the weights by version, and the same bits
on any number of ranks, whatever comes between steps."""

from functools import cache

import jobs
import pytest
import torch
from jobs import PRECISIONS
from ranks import run_ranks
from reference import Reference, batch, table_of
from samples import sampled
from test_rows import compare

AHEAD = {"mode": "backprop", "run_ahead": "auto"}


class ByVersion(Reference):
    """A reference whose layers go forward and backward with the weights of an earlier step."""

    def remember(self, weights):
        """Keep the weights of the layers; those of heads and readout are always the newest."""
        weights.append(
            [
                [p.detach().clone() for p in self._trunk_parameters(s)]
                for s in range(self.num_segments)
            ]
        )

    def step_of_versions(self, micro_batches, tables, versions, weights):
        """One optimizer step.

        Args:
            versions: for each micro-batch the number of each segment's weights in `weights`.
        """
        total, losses = {}, {}
        for ids, table, used in zip(micro_batches, tables, versions, strict=True):
            for segment, version in enumerate(used):
                self._put(segment, weights[version][segment])
            for loss, value in self.losses(ids, table).items():
                losses.setdefault(loss, []).append(value.item())
                own = list(self._head_parameters(loss))
                pairs = [(own, 1.0)]
                pairs += [(self._trunk_parameters(s), w) for s, w in table[loss].items()]
                for parameters, weight in pairs:
                    found = torch.autograd.grad(value, parameters, retain_graph=True)
                    for parameter, gradient in zip(parameters, found, strict=True):
                        scaled = gradient * (weight / len(micro_batches))
                        total[parameter] = (
                            total[parameter] + scaled if parameter in total else scaled
                        )
        for segment in range(self.num_segments):
            self._put(segment, weights[-1][segment])
        for parameter, gradient in total.items():
            parameter.grad = gradient
        for parameters, optimizer in zip(self.parameters, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {loss: sum(values) / len(values) for loss, values in losses.items()}

    def _put(self, segment, values):
        with torch.no_grad():
            for parameter, value in zip(self._trunk_parameters(segment), values, strict=True):
                parameter.data = value.clone()


def reference_run(parts, gas, steps, tables, leads, replicas=1):
    """Segment s with lead a: micro-batch n of the run uses the weights after (n - a) // M steps."""
    model, weights, losses = ByVersion("gpt2", parts), [], []
    for step in range(steps):
        model.remember(weights)
        numbers = range(step * gas, (step + 1) * gas)
        versions = [
            [max(0, (n - lead) // gas) for lead in leads] for n in numbers for _ in range(replicas)
        ]
        micro_batches = [batch(step, m, r) for m in range(gas) for r in range(replicas)]
        of_all = [table for table in tables for _ in range(replicas)]
        losses.append(model.step_of_versions(micro_batches, of_all, versions, weights))
    return losses, model.state()


@pytest.mark.parametrize(
    ("stages", "gas"),
    sampled(  # every M: fewer and more micro-batches than stages ahead
        [(4, 1), (2, 2), (3, 4), (2, 8)],
        [(stages, gas) for stages in (2, 3, 4) for gas in (1, 2, 4, 8)],
    ),
)
def test_backpropagation_equals_one_process_with_weights_by_version(stages, gas):
    # the first micro-batch is 3 steps old at most; many steps where it is
    steps = 20 if (stages, gas) == (4, 1) else 6
    results = run_ranks(jobs.train, stages, AHEAD, stages, steps, gas=gas)
    leads = [stages - 1 - s for s in range(stages)]
    tables = [table_of("backprop", stages)] * gas
    compare(results, *reference_run(results[0]["parts"], gas, steps, tables, leads))


ROWS = {
    "interlocking": ({"mode": "interlocking", "window": 3}, [2, 2, 1, 0]),
    "overlapping": ({"mode": "overlapping", "window": 2}, [1, 1, 1, 0]),
    "chunked": ({"mode": "chunked", "window": 2}, [1, 1, 1, 0]),
    "deep supervision": ({"mode": "deep_supervision"}, [3, 2, 1, 0]),
    "at most one": ({"mode": "backprop", "run_ahead": 1}, [1, 1, 1, 0]),
    "slow links": ({"mode": "backprop", "link": {"transfer": 1.0}}, [6, 4, 2, 0]),
}


@pytest.mark.parametrize(
    ("name", "gas"),
    sampled(  # M = 1, where weights are as many steps old as the lead is long, unless it is 1
        [*zip(ROWS, (1, 4, 4, 1, 4, 1), strict=True)], [(n, gas) for n in ROWS for gas in (1, 4)]
    ),
)
def test_row_equals_one_process_with_weights_by_version(name, gas):
    row, leads = ROWS[name]
    # as old as they get, and twice again
    steps = 2 + max(leads) if gas == 1 else 4
    results = run_ranks(jobs.train, 4, AHEAD | row, 4, steps, gas=gas)
    window = {"window": row["window"]} if "window" in row else {}
    tables = [table_of(row["mode"], 4, **window)] * gas
    compare(results, *reference_run(results[0]["parts"], gas, steps, tables, leads))


MIX = {"mix": [{"mode": "backprop", "micro_batches": 3}, {"mode": "local"}], "run_ahead": "auto"}


def test_mix_equals_one_process_with_weights_by_version():
    results = run_ranks(jobs.train, 4, MIX, 4, 4)
    tables = [table_of("backprop", 4)] * 3 + [table_of("local", 4)]
    compare(results, *reference_run(results[0]["parts"], 4, 4, tables, [3, 2, 1, 0]))


def test_replicas_equal_one_process_with_weights_by_version():
    results = run_ranks(jobs.train, 4, AHEAD, 2, 4)
    tables = [table_of("backprop", 2)] * 4
    compare(results, *reference_run(results[0]["parts"], 4, 4, tables, [1, 0], replicas=2))


def test_nothing_ahead_is_1f1b_to_the_bit():
    plain, none = (
        run_ranks(jobs.train, 2, {"mode": "backprop", **ahead}, 2, 4)
        for ahead in ({}, {"run_ahead": 0})
    )
    assert plain[0]["reports"] == none[0]["reports"]
    for a, b in zip(plain, none, strict=True):
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])


# --- the same bits, whatever comes between --------------------------------------------------------

SECTIONS = [
    AHEAD,
    AHEAD | {"run_ahead": 2},
    AHEAD | {"mode": "interlocking"},
    AHEAD | {"mode": "overlapping", "window": 3},
    AHEAD | {"mode": "chunked"},
    AHEAD | {"loss_weighting": "token"},
    MIX,
]


@pytest.mark.parametrize(
    ("section", "gas"),
    sampled(  # the whole lead with both, windows with one each
        [(AHEAD, 1), (AHEAD, 4), *zip(SECTIONS[2:5], (4, 1, 4), strict=True), (MIX, 4)],
        [(section, gas) for section in SECTIONS for gas in (1, 4) if (section, gas) != (MIX, 1)],
    ),
    ids=str,
)
def test_four_segments_give_the_same_bits_on_1_2_and_4_ranks(section, gas):
    runs = [
        run_ranks(
            jobs.train,
            ranks,
            {**section, "segments_per_stage": 4 // ranks},
            ranks,
            5 if gas == 1 else 3,
            gas=gas,
        )
        for ranks in (1, 2, 4)
    ]
    same_bits(*runs)


def same_bits(reference, *others):
    """Of runs on any numbers of ranks."""
    whole = {name: tensor for result in reference for name, tensor in result["state"].items()}
    for other in others:
        assert other[0]["reports"] == reference[0]["reports"]
        assert other[0]["eval"] == reference[0]["eval"]
        merged = {name: tensor for result in other for name, tensor in result["state"].items()}
        assert set(merged) == set(whole)
        assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())


def journey(
    section, stages, steps, folder=None, save_at=(), evaluate_at=(), told=False, back=0, **settings
):
    """Train to `steps` steps from the latest checkpoint in `folder`, if any, with saves and
    evaluations on the way; `back`: after the first step beyond a save, load it so many times."""
    engine = jobs.build(section, stages, **settings)
    reports = {}
    engine.reports.listeners.append(
        lambda rows: reports.update({rows[0].step: {r.segment: r.loss for r in rows}})
    )
    if folder is not None and (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
    if told:
        engine.ends_after(steps)
    data = jobs.batches(engine, engine.global_steps)
    while engine.global_steps < steps:
        engine.train_batch(data)
        if engine.global_steps in evaluate_at:
            engine.eval_batch(jobs.batches(engine, start=10_000), num_micro_batches=3)
        if back and engine.global_steps - 1 in save_at:
            back -= 1
            engine.load_checkpoint(str(folder))
            data = jobs.batches(engine, engine.global_steps)
        elif engine.global_steps in save_at:
            engine.save_checkpoint(str(folder))
    engine.eval_batch(jobs.batches(engine, start=10_000))
    return {
        "reports": [reports[step] for step in sorted(reports)],
        "eval": engine.eval_losses,
        "state": jobs.state_of(engine),
        "live": len(engine.executor.live),
        "copies": len(engine.executor.stash._copies),
    }


TWO_EACH = AHEAD | {"mode": "overlapping", "segments_per_stage": 2}


@pytest.mark.parametrize(
    ("section", "gas"),
    sampled([(AHEAD, 1), (TWO_EACH, 4)], [(s, gas) for s in (AHEAD, TWO_EACH) for gas in (1, 4)]),
    ids=str,
)
def test_saves_evaluations_and_a_resume_change_no_bit(section, gas, tmp_path):
    ranks = 4 // section.get("segments_per_stage", 1)
    plain = run_ranks(journey, ranks, section, ranks, 6, gas=gas)
    busy = run_ranks(
        journey, ranks, section, ranks, 6, tmp_path / "busy", (2, 5), (1, 2, 4), gas=gas
    )
    same_bits(plain, busy)
    run_ranks(journey, ranks, section, ranks, 3, tmp_path / "cut", (3,), gas=gas)
    assert {p.name for p in (tmp_path / "cut" / "global_step3").glob("ahead_*")}
    resumed = run_ranks(journey, ranks, section, ranks, 6, tmp_path / "cut", gas=gas)
    assert [len(run[0]["reports"]) for run in (plain, busy, resumed)] == [6, 6, 3]
    for run in (plain, resumed):
        run[0]["reports"] = run[0]["reports"][-3:]
    same_bits(plain, resumed)


def test_going_back_to_a_checkpoint_takes_what_is_on_its_way(tmp_path):
    plain = run_ranks(journey, 3, AHEAD, 3, 5, gas=2)
    back = run_ranks(journey, 3, AHEAD, 3, 5, tmp_path, (2,), back=1, gas=2)
    for a, b in zip(plain, back, strict=True):
        assert a["eval"] == b["eval"]
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])


def test_a_checkpoint_of_another_lead_starts_afresh(tmp_path):
    run_ranks(journey, 2, AHEAD, 2, 3, tmp_path, (3,))
    other = run_ranks(journey, 2, {"mode": "backprop"}, 2, 5, tmp_path)
    assert len(other[0]["reports"]) == 2
    again = run_ranks(journey, 2, AHEAD, 2, 5, tmp_path, gas=2)
    assert len(again[0]["reports"]) == 2


def test_a_run_that_knows_its_end_computes_nothing_for_later(tmp_path):
    for told in (True, False):
        results = run_ranks(journey, 3, AHEAD, 3, 4, told=told, gas=2)
        assert (sum(r["live"] for r in results) == 0) == told
        assert (sum(r["copies"] for r in results) == 0) == told


PHASES = {
    "phases": [
        {"mode": "backprop", "run_ahead": "auto", "until_step": 3},
        {"mode": "backprop", "until_step": 4},
        {"mode": "overlapping", "window": 2, "run_ahead": "auto", "until_step": 6},
        {"mode": "backprop", "run_ahead": 2},
    ]
}


@pytest.mark.parametrize("gas", sampled([1], [1, 4]))
def test_phases_begin_and_end_with_nothing_ahead(gas):
    runs = [
        run_ranks(
            jobs.train, ranks, {**PHASES, "segments_per_stage": 4 // ranks}, ranks, 9, gas=gas
        )
        for ranks in (1, 4)
    ]
    same_bits(*runs)
    rows = [
        ("backprop", [3, 2, 1, 0], 0, 3),
        ("backprop", [0] * 4, 3, 4),
        ("overlapping", [1, 1, 1, 0], 4, 6),
    ]
    rows.append(("backprop", [2, 2, 1, 0], 6, 9))
    model, weights, losses = ByVersion("gpt2", runs[0][0]["parts"]), [], []
    for mode, leads, start, stop in rows:
        for step in range(start, stop):
            model.remember(weights)
            numbers = range((step - start) * gas, (step - start + 1) * gas)
            versions = [[start + max(0, (n - lead) // gas) for lead in leads] for n in numbers]
            micro_batches = [batch(step, m, 0) for m in range(gas)]
            losses.append(
                model.step_of_versions(micro_batches, [table_of(mode, 4)] * gas, versions, weights)
            )
    compare(runs[1], losses, model.state())


# --- how a run ends -------------------------------------------------------------------------------


def until_the_data_ends(section, stages, batches, **settings):
    """Steps taken, weights, and what was raised when there was no data for another step."""
    import itertools

    engine = jobs.build(section, stages, **settings)
    data = jobs.batches(engine)
    data = None if data is None else itertools.islice(data, batches)
    try:
        while True:
            engine.train_batch(data)
    except Exception as error:
        return {"steps": engine.global_steps, "state": jobs.state_of(engine), "error": str(error)}


@pytest.mark.parametrize(("gas", "batches"), [(2, 10), (2, 11), (1, 5)])
def test_all_steps_that_have_data_are_taken(gas, batches):
    results = run_ranks(until_the_data_ends, 3, AHEAD, 3, batches, gas=gas)
    steps = batches // gas
    assert [r["steps"] for r in results] == [steps] * 3
    assert all("the data ran out" in r["error"] for r in results)
    told = run_ranks(journey, 3, AHEAD, 3, steps, told=True, gas=gas)
    for a, b in zip(results, told, strict=True):
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])


def stopped(section, stages, folder, steps, asks, **settings):
    """Steps taken until all stop, one rank having asked for it after the second step."""
    engine = jobs.build(section, stages, **settings)
    if (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
    data = jobs.batches(engine, engine.global_steps)
    while engine.global_steps < steps and not engine.should_stop:
        engine.train_batch(data)
        if asks and engine.global_steps == 2 and engine.stage_id == 0:
            engine.request_stop()
    if engine.should_stop:
        engine.save_checkpoint(str(folder))
    return {"steps": engine.global_steps, "state": jobs.state_of(engine)}


def test_a_stop_is_at_the_same_step_for_all_and_changes_no_bit(tmp_path):
    found = run_ranks(stopped, 3, AHEAD, 3, tmp_path, 8, True, gas=1)
    assert [r["steps"] for r in found] == [5] * 3  # what has run ahead at step 2, and one more
    resumed = run_ranks(stopped, 3, AHEAD, 3, tmp_path, 8, False, gas=1)
    plain = run_ranks(journey, 3, AHEAD, 3, 8, gas=1)
    for a, b in zip(plain, resumed, strict=True):
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])


# --- corrections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gas", sampled([1, 2], [1, 2, 4]))
def test_predicted_weights_equal_one_process_that_predicts(gas):
    """The last update once more for each update to come before the gradient's own."""
    section = AHEAD | {"predict_weights": True}
    steps, leads = 6, [2, 1, 0]
    results = run_ranks(jobs.train, 3, section, 3, steps, gas=gas)
    model, weights, losses = ByVersion("gpt2", results[0]["parts"]), [], []
    for step in range(steps):
        model.remember(weights)
        versions, known = [], list(weights)
        for n in range(step * gas, (step + 1) * gas):
            versions.append([])
            for segment, lead in enumerate(leads):
                version = max(0, (n - lead) // gas)
                old, now = (weights[max(0, v)][segment] for v in (version - 1, version))
                moved = [b + (step - version) * (b - a) for a, b in zip(old, now, strict=True)]
                known.append({segment: moved})
                versions[-1].append(len(known) - 1)
        known.append(weights[-1])
        micro_batches = [batch(step, m, 0) for m in range(gas)]
        tables = [table_of("backprop", 3)] * gas
        losses.append(model.step_of_versions(micro_batches, tables, versions, known))
    compare(results, losses, model.state())


def test_predicted_weights_have_the_same_bits_on_1_2_and_4_ranks_and_after_a_resume(tmp_path):
    for mode in ("backprop", "overlapping"):
        section = AHEAD | {"mode": mode, "predict_weights": True}
        plain, *others = [
            run_ranks(journey, n, {**section, "segments_per_stage": 4 // n}, n, 6, gas=1)
            for n in (1, 2, 4)
        ]
        same_bits(plain, *others)
        folder = tmp_path / mode
        run_ranks(journey, 4, section, 4, 3, folder, (3,), gas=1)
        resumed = run_ranks(journey, 4, section, 4, 6, folder, gas=1)
        plain[0]["reports"] = plain[0]["reports"][-3:]
        same_bits(plain, resumed)


def rates(section, stages):
    """The learning rate of each segment in the first and the last step."""
    engine = jobs.build(section, stages)
    seen = []
    engine.reports.listeners.append(lambda rows: seen.append([r.lr for r in rows]))
    data = jobs.batches(engine)
    for _ in range(3):
        engine.train_batch(data)
    engine.eval_batch(jobs.batches(engine, start=10_000))
    return [seen[0], seen[-1]] if seen else None


def test_learning_rates_are_lower_where_the_delay_is_longer():
    found = run_ranks(rates, 3, AHEAD | {"delay_discount": 1.0}, 3)[0]
    for of_step in found:
        assert of_step == pytest.approx([1e-2 / 1.5, 1e-2 / 1.25, 1e-2])


# --- precisions, recomputed activations, compiled layers ------------------------------------------


@cache
def reports_of(replicas, precision=None):
    settings = PRECISIONS[precision] if precision else {}
    return run_ranks(jobs.train, 2 * replicas, AHEAD, 2, 20, **settings)[0]["reports"]


@pytest.mark.parametrize(
    ("precision", "replicas"),
    sampled(  # ZeRO shares out among two
        [("bf16 ZeRO-1", 2)], [(p, n) for p in PRECISIONS for n in (1, 2)]
    ),
)
def test_every_precision_follows_fp32(precision, replicas):
    plain, other = reports_of(replicas), reports_of(replicas, precision)
    for segment in plain[0]:
        if plain[0][segment] is not None:
            fall = plain[0][segment] - plain[-1][segment]
            assert fall > 0.1
            assert other[0][segment] - other[-1][segment] == pytest.approx(fall, rel=0.5)


def seen_by_passes(section, stages, steps, **settings):
    """Were all backward passes with the weights of their forward passes? Compared by their sums."""
    engine = jobs.build(section, stages, **settings)
    executor, sums, wrong = engine.executor, {}, []
    run, weights = executor._run, engine.module.layer_parameters

    def total(segment):
        return sum(p.detach().double().sum().item() for p in weights(segment))

    def forward(segment, live, inputs):
        run(segment, live, inputs)
        sums[id(live)] = live, total(segment)

    backward = torch.autograd.backward

    def watched(tensors, *args, **kwargs):
        for live, expected in list(sums.values()):
            if isinstance(tensors, list) and any(
                t is slot for t in tensors for slot in live.outputs.slots
            ):
                segment = next(s for (s, *_), one in executor.live.items() if one is live)
                wrong.append(abs(total(segment) - expected))
        return backward(tensors, *args, **kwargs)

    executor._run = forward
    torch.autograd.backward = watched
    try:
        data = jobs.batches(engine)
        for _ in range(steps):
            engine.train_batch(data)
    finally:
        torch.autograd.backward = backward
    newest = total(engine.module.local_segments[0])
    return {"compared": len(wrong), "worst": max(wrong, default=0.0), "moved": newest}


@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_forward_and_backward_have_the_same_weights(precision):
    settings = PRECISIONS.get(precision, {})
    first, _ = run_ranks(seen_by_passes, 2, AHEAD, 2, 5, gas=1, **settings)
    assert first["compared"] == 5
    assert first["worst"] == 0.0


def recomputed(section, stages, steps, interval, compiled=False):
    from reference import GPT2

    import ds_local

    config = jobs.ds_config(section, 2)
    module = ds_local.causal_lm(GPT2, stages, config, activation_checkpoint_interval=interval)
    engine = ds_local.initialize(model=module, config=config)[0]
    if compiled:
        engine.compile(backend="aot_eager")
    data = jobs.batches(engine)
    for _ in range(steps):
        engine.train_batch(data)
    return jobs.state_of(engine)


def test_recomputed_activations_have_the_weights_of_their_forward():
    plain, again = (run_ranks(recomputed, 2, AHEAD, 2, 5, interval) for interval in (0, 1))
    for a, b in zip(plain, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_compiled_layers_have_the_weights_of_their_forward():
    plain, compiled = (run_ranks(recomputed, 2, AHEAD, 2, 5, 0, c) for c in (False, True))
    for a, b in zip(plain, compiled, strict=True):
        for name in a:
            torch.testing.assert_close(
                a[name], b[name.replace("._orig_mod", "")], rtol=1e-4, atol=1e-6
            )
