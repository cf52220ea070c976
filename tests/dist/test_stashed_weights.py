"""Forwards that run ahead against one process that keeps the weights by version, and the same bits
on any number of ranks, whatever comes between steps."""

import jobs
import pytest
import torch
from ranks import run_ranks
from reference import Reference, batch, table_of
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


@pytest.mark.parametrize("gas", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_backpropagation_equals_one_process_with_weights_by_version(stages, gas):
    steps = 20
    results = run_ranks(jobs.train, stages, AHEAD, stages, steps, gas=gas)
    leads = [stages - 1 - s for s in range(stages)]
    tables = [table_of("backprop", stages)] * gas
    compare(results, *reference_run(results[0]["parts"], gas, steps, tables, leads))


ROWS = {
    "chunked": ({"mode": "chunked", "window": 2}, [1, 0, 1, 0]),
    "interlocking": ({"mode": "interlocking", "window": 3}, [2, 2, 1, 0]),
    "overlapping": ({"mode": "overlapping", "window": 2}, [1, 1, 1, 0]),
    "deep supervision": ({"mode": "deep_supervision"}, [3, 2, 1, 0]),
    "at most one": ({"mode": "backprop", "run_ahead": 1}, [1, 1, 1, 0]),
    "slow links": ({"mode": "backprop", "link": {"transfer": 1.0}}, [6, 4, 2, 0]),
}


@pytest.mark.parametrize("gas", [1, 4])
@pytest.mark.parametrize("name", ROWS)
def test_row_equals_one_process_with_weights_by_version(name, gas):
    row, leads = ROWS[name]
    results = run_ranks(jobs.train, 4, AHEAD | row, 4, 8, gas=gas)
    window = {"window": row["window"]} if "window" in row else {}
    tables = [table_of(row["mode"], 4, **window)] * gas
    compare(results, *reference_run(results[0]["parts"], gas, 8, tables, leads))


MIX = {"mix": [{"mode": "backprop", "micro_batches": 3}, {"mode": "local"}], "run_ahead": "auto"}


def test_mix_equals_one_process_with_weights_by_version():
    results = run_ranks(jobs.train, 4, MIX, 4, 8)
    tables = [table_of("backprop", 4)] * 3 + [table_of("local", 4)]
    compare(results, *reference_run(results[0]["parts"], 4, 8, tables, [3, 2, 1, 0]))


def test_replicas_equal_one_process_with_weights_by_version():
    results = run_ranks(jobs.train, 4, AHEAD, 2, 8)
    tables = [table_of("backprop", 2)] * 4
    compare(results, *reference_run(results[0]["parts"], 4, 8, tables, [1, 0], replicas=2))


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
    AHEAD | {"mode": "chunked"},
    AHEAD | {"mode": "interlocking"},
    AHEAD | {"mode": "overlapping", "window": 3},
    AHEAD | {"loss_weighting": "token"},
    MIX,
]


@pytest.mark.parametrize("gas", [1, 4])
@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_four_segments_give_the_same_bits_on_1_2_and_4_ranks(section, gas):
    runs = [
        run_ranks(
            jobs.train, ranks, {**section, "segments_per_stage": 4 // ranks}, ranks, 5, gas=gas
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
    evaluations on the way; `back`: after the first step beyond a save, load it again so many times."""
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


@pytest.mark.parametrize("gas", [1, 4])
@pytest.mark.parametrize(
    "section", [AHEAD, AHEAD | {"mode": "chunked", "segments_per_stage": 2}], ids=str
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
        {"mode": "chunked", "run_ahead": "auto", "until_step": 6},
        {"mode": "backprop", "run_ahead": 2},
    ]
}


@pytest.mark.parametrize("gas", [1, 4])
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
        ("chunked", [1, 0, 1, 0], 4, 6),
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
