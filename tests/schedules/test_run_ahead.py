"""Forwards that run ahead: hand-worked grids, no waiting, and the weights that a stage may keep."""

import random
from fractions import Fraction

import pytest

from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError, ScheduleError
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.replay import grid_of, replay, validate
from ds_local.schedules.routes import make_routes
from ds_local.schedules.run_ahead import copies_of, leads_of, make_run_ahead
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import FORWARD, Schedule, successive
from ds_local.schedules.simulator import Costs, simulate


def rows(mode, segments, micro_batches, window=None):
    return [(make_routes(mode, segments, window), micro_batches)]


GRIDS = {
    "run_ahead_backprop_p4_m4": (rows("backprop", 4, 4), None),
    "run_ahead_backprop_p3_m1": (rows("backprop", 3, 1), None),
    "run_ahead_1_backprop_p4_m4": (rows("backprop", 4, 4), 1),
    "run_ahead_chunked2_p4_m4": (rows("chunked", 4, 4, 2), None),
    "run_ahead_interlocking2_p4_m4": (rows("interlocking", 4, 4, 2), None),
    "run_ahead_mixed_3_of_4_p4": (rows("backprop", 4, 3) + rows("local", 4, 1), None),
}


@pytest.mark.parametrize("name", GRIDS)
def test_golden_grid(name, golden):
    mix, limit = GRIDS[name]
    golden(f"{name}.txt", grid_of(make_run_ahead(mix, mix[0][0].num_segments, limit)))


def test_a_step_in_the_middle_of_a_run_is_one_forward_one_backward():
    """Worked by hand: stage 0 of four is three forwards ahead, the last stage none."""
    schedule = make_run_ahead(rows("backprop", 4, 4), 4)
    assert schedule.leads == (3, 2, 1, 0)
    assert " ".join(map(str, schedule.stages[0])) == "F3 B0 F0+ B1 F1+ B2 F2+ B3"
    assert " ".join(map(str, schedule.stages[2])) == "F1 B0 F2 B1 F3 B2 F0+ B3"
    assert " ".join(map(str, schedule.stages[3])) == "F0 B0 F1 B1 F2 B2 F3 B3"
    first, last = schedule.at(True).stages[0], schedule.at(False, 1).stages[0]
    assert " ".join(map(str, first)) == "F0 F1 F2 F3 B0 F0+ B1 F1+ B2 F2+ B3"
    assert " ".join(map(str, last)) == "F3 B0 B1 B2 B3"
    assert schedule.delays == [0.75, 0.5, 0.25, 0.0]


def test_a_step_alone_has_all_its_forwards_and_no_others():
    for mode, window in [("backprop", None), ("chunked", 4), ("overlapping", 2)]:
        alone = make_run_ahead(rows(mode, 4, 3, window), 4).at(True, 1)
        forwards = {(a.segment, a.micro_batch) for a in alone.actions() if a.kind == FORWARD}
        assert forwards == {(s, m) for s in range(4) for m in range(3)}
        assert all(a.ahead == 0 for a in alone.actions())


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("link", [0, 0.5, 1, 3])
def test_no_stage_waits(stages, micro_batches, link):
    """Backpropagation and chunks of any size, when the order reckons with the links."""
    for mode, window in [("backprop", None), *(("chunked", w) for w in (2, 3, 4, 8))]:
        window = window and min(window, stages)
        schedule = make_run_ahead(rows(mode, stages, micro_batches, window), stages, None, link)
        timeline = simulate(schedule, Costs(link=link))
        assert timeline.steady_period == pytest.approx(3 * micro_batches)
        assert timeline.idle_share == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_rows_with_several_losses_a_segment_wait_for_nothing_on_fast_links(micro_batches):
    for mode in ("interlocking", "overlapping"):
        timeline = simulate(make_run_ahead(rows(mode, 6, micro_batches, 2), 6), Costs())
        assert timeline.steady_period == pytest.approx(max(timeline.busy))


def test_live_micro_batches_are_those_of_1f1b():
    for micro_batches in (1, 2, 4, 8):
        schedule = make_run_ahead(rows("backprop", 4, micro_batches), 4)
        assert schedule.peak_live == (4, 3, 2, 1)
    assert make_run_ahead(rows("backprop", 4, 8), 4).at(True, 1).peak_live == (4, 3, 2, 1)


def test_a_limit_trades_waiting_for_delay():
    idle, delay = [], []
    for limit in (1, 2, 3, 9):
        schedule = make_run_ahead(rows("backprop", 4, 4), 4, limit)
        idle.append(simulate(schedule, Costs()).idle_share)
        delay.append(max(schedule.delays))
    assert idle == sorted(idle, reverse=True)
    flushed = simulate(make_schedule(rows("backprop", 4, 4), 4), Costs()).idle_share
    assert flushed > idle[0] > 0.2
    assert idle[2] == idle[3] == pytest.approx(0)
    assert delay == [0.25, 0.5, 0.75, 0.75]


def test_a_limit_of_nothing_is_1f1b():
    for stages, micro_batches in ((2, 1), (4, 2), (4, 8)):
        table = rows("backprop", stages, micro_batches)
        flushed = make_schedule(table, stages)
        assert make_run_ahead(table, stages, 0).stages == flushed.stages


def test_leads_never_rise_and_go_on_below_a_chunk():
    assert leads_of(rows("chunked", 8, 4, 2)) == (1, 1, 1, 1, 1, 1, 1, 0)
    assert leads_of(rows("chunked", 8, 4, 4)) == (5, 4, 3, 3, 3, 2, 1, 0)
    assert leads_of(rows("chunked", 4, 4, 2), transfer=1) == (3, 2, 2, 0)
    assert leads_of(rows("chunked", 8, 4, 4), limit=2) == (2, 2, 2, 2, 2, 2, 1, 0)


def test_slow_links_need_a_longer_lead():
    table = rows("backprop", 4, 4)
    assert leads_of(table, transfer=0) == (3, 2, 1, 0)
    assert leads_of(table, transfer=1) == leads_of(table, transfer=1.5) == (6, 4, 2, 0)
    assert leads_of(table, transfer=3) == (9, 6, 3, 0)
    assert leads_of(table, limit=4, transfer=3) == (4, 4, 3, 0)


# --- random cases ---------------------------------------------------------------------------------


def random_case(rng):
    stages = rng.choice([1, 2, 3, 4, 8])
    segments = stages * rng.choice([1, 1, 2])
    modes = ["backprop", "overlapping", "interlocking", "deep_supervision"]
    mix = rows(rng.choice(modes), segments, rng.randint(1, 6))
    if rng.random() < 0.4:
        mix += rows(rng.choice(["local", *modes]), segments, rng.randint(1, 4))
    return make_run_ahead(mix, stages, rng.choice([None, None, 1, 3]), rng.choice([0, 0, 1, 3]))


def test_random_cases():
    rng = random.Random(0)
    for _ in range(150):
        schedule = random_case(rng)
        validate(schedule, 64)
        check_weights(schedule, steps=3 + 2 * schedule.steps_ahead)


def check_weights(schedule, steps):
    """In a run of `steps` steps every micro-batch runs once on each segment, goes forward no later
    than in its own step and no earlier than its weights are there, and backward in its own step."""
    count, seen, kept = schedule.num_micro_batches, set(), [0] * len(schedule.stage_of)
    events, stuck = replay(schedule, steps=steps)
    assert stuck is None
    in_use = [{} for _ in schedule.stage_of]  # version -> forwards whose backward is to come
    order = {s: [] for s in range(len(schedule.stage_of))}
    for event in events:
        order[event.action.segment].append(event)
    for segment, lead in enumerate(schedule.leads):
        forwards = [e for e in order[segment] if e.action.kind == FORWARD]
        positions = [(e.step + e.action.ahead) * count + e.action.micro_batch for e in forwards]
        assert positions == list(range(steps * count))
        for event, position in zip(forwards, positions, strict=True):
            version = max(0, (position - lead) // count)
            assert version <= event.step <= position // count
            assert version == event.step
        for event in order[segment]:
            action = event.action
            of_step = event.step + action.ahead
            if action.kind == FORWARD:
                version = max(0, (of_step * count + action.micro_batch - lead) // count)
                if version < of_step and schedule.rows[action.micro_batch].passes[segment]:
                    in_use[segment].setdefault(version, set()).add((of_step, action.micro_batch))
            else:
                assert action.ahead == 0
                passes = schedule.rows[action.micro_batch].passes[segment]
                seen.add((segment, of_step, action.micro_batch, action.which))
                done = all(
                    (segment, of_step, action.micro_batch, which) in seen
                    for which in range(len(passes))
                )
                for users in in_use[segment].values():
                    if done:
                        users.discard((of_step, action.micro_batch))
            kept[segment] = max(kept[segment], sum(map(bool, in_use[segment].values())))
    assert not any(users for of in in_use for users in of.values())
    expected = sum(
        len(schedule.rows[m].passes[s]) for m in range(count) for s in range(len(schedule.stage_of))
    )
    assert len(seen) == steps * expected
    if len(schedule.stage_of) == schedule.num_stages:
        assert all(most <= bound for most, bound in zip(kept, copies_of(schedule), strict=True))


def test_the_copies_of_weights_are_no_more_than_needed():
    for micro_batches, copies in [(1, [4, 3, 2, 0]), (4, [2, 1, 1, 0]), (8, [1, 1, 1, 0])]:
        schedule = make_run_ahead(rows("backprop", 4, micro_batches), 4)
        assert copies_of(schedule) == copies
        check_weights(schedule, 12)


def test_the_delay_is_the_lead_in_steps():
    """Updates between a forward's weights and the update of its step, counted one by one."""
    for micro_batches in (1, 2, 3, 4, 8):
        schedule = make_run_ahead(rows("backprop", 4, micro_batches), 4)
        for lead, delay in zip(schedule.leads, schedule.delays, strict=True):
            step = 10
            ages = [
                step - (step * micro_batches + m - lead) // micro_batches
                for m in range(micro_batches)
            ]
            assert Fraction(sum(ages), micro_batches) == Fraction(lead, micro_batches)
            assert delay == pytest.approx(sum(ages) / micro_batches)


@pytest.mark.parametrize("seed", range(20))
def test_the_same_weights_and_sums_on_any_number_of_stages(seed):
    rng = random.Random(seed)
    modes = ["backprop", "overlapping", "interlocking", "chunked"]
    mix = rows(rng.choice(modes), 4, rng.randint(1, 4))
    mix += rows("local", 4, rng.randint(0, 3))
    found = []
    for stages in (1, 2, 4):
        schedule = make_run_ahead(mix, stages)
        validate(schedule, 4)
        passes = [
            [
                (a.micro_batch, a.which)
                for a in schedule.actions()
                if a.kind != FORWARD and a.segment == s
            ]
            for s in range(4)
        ]
        found.append((schedule.leads, schedule.rows, passes))
    assert found[0] == found[1] == found[2]


# --- successive steps -----------------------------------------------------------------------------


def test_a_stretch_begins_and_ends_with_nothing_ahead():
    ahead = make_run_ahead(rows("backprop", 4, 2), 4)
    plain = make_run_ahead(rows("backprop", 4, 2), 4, 0)
    run = successive([ahead] * 5 + [plain] + [ahead] * 2)
    assert [one.is_first for one in run] == [True, False, False, False, False, True, True, False]
    assert [one.steps_left for one in run] == [None, None, None, 2, 1, None, 2, 1]
    assert run[1] is run[2]


def test_validate_sees_forwards_that_are_missing_or_too_early():
    good = make_run_ahead(rows("backprop", 2, 2), 2)
    late = Schedule(
        good.name, good.stages, good.stage_of, good.rows, good.leads, ((), good.opening[1])
    )
    with pytest.raises(ScheduleError, match="missing, unknown or double"):
        validate(late, 4)
    swapped = Schedule(
        good.name,
        (good.stages[0][::-1], good.stages[1]),
        good.stage_of,
        good.rows,
        good.leads,
        good.opening,
    )
    with pytest.raises(ScheduleError, match="deadlock"):
        validate(swapped, 4)


def test_a_link_too_short_for_what_runs_ahead_is_named():
    with pytest.raises(ScheduleError, match=r"links hold 1 messages, raise link.depth"):
        validate(make_run_ahead(rows("backprop", 4, 4), 4, None, 3), 1)


# --- the config -----------------------------------------------------------------------------------


def plan(section, stages=4, micro_batches=4):
    return RunPlan(local_parallel({"local_parallel": section}), stages, micro_batches)


def test_the_option_of_a_scheme():
    assert plan({"mode": "backprop"}).schedule_at(0).leads == ()
    assert plan({"mode": "backprop", "run_ahead": 0}).schedule_at(0).leads == ()
    assert plan({"mode": "backprop", "run_ahead": "auto"}).schedule_at(0).leads == (3, 2, 1, 0)
    assert plan({"mode": "backprop", "run_ahead": 2}).schedule_at(0).leads == (2, 2, 1, 0)
    slow = {"mode": "backprop", "run_ahead": "auto", "link": {"transfer": 1.0}}
    assert plan(slow).schedule_at(0).leads == (6, 4, 2, 0)
    phases = [{"mode": "overlapping", "run_ahead": "auto", "until_step": 5}, {"mode": "backprop"}]
    assert [s.leads for s in plan({"phases": phases}).schedules] == [(1, 1, 1, 0), ()]


def test_chunks_of_two_are_one_forward_ahead():
    """Worked by hand: the lower chunk is as far ahead as the upper one needs, and no further."""
    schedule = plan({"mode": "chunked", "window": 2, "run_ahead": "auto"}).schedule_at(0)
    assert schedule.leads == (1, 1, 1, 0)
    assert " ".join(map(str, schedule.stages[0])) == "F1 B0 F2 B1 F3 B2 F0+ B3"
    assert " ".join(map(str, schedule.stages[1])) == "B0 F1 B1 F2 B2 F3 B3 F0+"
    assert schedule.peak_live == (2, 1, 2, 1)
    assert schedule.delays == [0.25, 0.25, 0.25, 0.0]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"mode": "local", "run_ahead": 1}, "none does: leave it out"),
        ({"mode": "shifted_chunked", "run_ahead": "auto"}, "leave run_ahead out"),
        ({"mode": "backprop", "run_ahead": 1, "split_backward": 1}, "leave one of them out"),
        ({"mode": "backprop", "run_ahead": 1, "diagnostics": True}, "leave one of them out"),
        ({"mode": "backprop", "run_ahead": -1}, "run_ahead"),
        ({"mode": "backprop", "run_ahead": "all"}, "run_ahead"),
        (
            {"mode": "backprop", "run_ahead": 1, "replicas": {"sync": "periodic"}},
            "the same weights on all replicas",
        ),
        (
            {
                "mix": [{"mode": "backprop", "micro_batches": "auto"}, {"mode": "local"}],
                "run_ahead": 1,
            },
            "give a number",
        ),
    ],
)
def test_what_cannot_go_together(section, words):
    with pytest.raises(ConfigError, match=words):
        local_parallel({"local_parallel": section})
