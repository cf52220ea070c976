"""Orders of compute: golden grids, the known makespans, and properties over thousands of random
cases."""

import contextlib
import random

import pytest
from samples import sampled
from schedule_rows import schedule_of

from ds_local.errors import RouteError, ScheduleError
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.replay import grid_of, replay, validate
from ds_local.schedules.routes import MODES, make_routes
from ds_local.schedules.schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
)
from ds_local.schedules.simulator import Costs, simulate

GRIDS = {
    "backprop_p4_m8": ([("backprop", None, 8)], 4),
    "local_p4_m4": ([("local", None, 4)], 4),
    "chunked2_p4_m8": ([("chunked", 2, 8)], 4),
    "overlapping2_p4_m4": ([("overlapping", 2, 4)], 4),
    "interlocking2_p4_m8": ([("interlocking", 2, 8)], 4),
    "interlocking3_p4_m8": ([("interlocking", 3, 8)], 4),
    "deep_supervision_p4_m4": ([("deep_supervision", None, 4)], 4),
    "mixed_2_of_8_p4": ([("backprop", None, 2), ("local", None, 6)], 4),
    "mixed_8_of_16_p4": ([("backprop", None, 8), ("local", None, 8)], 4),
}


@pytest.mark.parametrize("name", GRIDS)
def test_golden_grid(name, golden):
    parts, stages = GRIDS[name]
    golden(f"{name}.txt", grid_of(schedule_of(*parts, stages=stages)))


def test_golden_grid_of_four_segments_on_two_stages(golden):
    golden(
        "mixed_2_of_4_k4_p2.txt",
        grid_of(schedule_of(("backprop", None, 2), ("local", None, 2), stages=2, segments=4)),
    )


@pytest.mark.parametrize("name", ["chunked2_p4_m8", "mixed_2_of_8_p4", "overlapping2_p4_m4"])
def test_golden_grid_of_split_passes(name, golden):
    parts, stages = GRIDS[name]
    golden(f"{name}_split.txt", grid_of(schedule_of(*parts, stages=stages, split=2)))


@pytest.mark.parametrize(
    ("stages", "micro_batches", "parts", "makespan"),
    [
        # as published for these schedules with forward = input gradient = weight gradient = 1
        (4, 8, [("backprop", None, 8)], 33),
        (4, 8, [("local", None, 8)], 27),
        (4, 8, [("chunked", 2, 8)], 29),
        (8, 8, [("backprop", None, 8)], 45),
        (8, 8, [("local", None, 8)], 31),
        (8, 8, [("chunked", 2, 8)], 33),
        # mixed costs no time over local
        (4, 8, [("backprop", None, 1), ("local", None, 7)], 27),
        (4, 8, [("backprop", None, 2), ("local", None, 6)], 27),
        (4, 8, [("backprop", None, 4), ("local", None, 4)], 27),
        (4, 4, [("backprop", None, 1), ("local", None, 3)], 15),
        (8, 8, [("backprop", None, 2), ("local", None, 6)], 31),
        (8, 16, [("backprop", None, 4), ("local", None, 12)], 55),
        # forwards run ahead of the gradients they wait for, so these beat greedy orders (38, 43,
        # 42, 53)
        (4, 8, [("interlocking", 2, 8)], 34),
        (4, 8, [("interlocking", 3, 8)], 36),
        (8, 8, [("interlocking", 2, 8)], 38),
        (8, 8, [("interlocking", 3, 8)], 45),
        (4, 8, [("overlapping", 2, 8)], 34),
    ],
)
def test_makespan_of_one_step_alone(stages, micro_batches, parts, makespan):
    assert simulate(schedule_of(*parts, stages=stages), Costs()).makespan == makespan


@pytest.mark.parametrize("stages", [4, 8])
@pytest.mark.parametrize("micro_batches", [8, 16])
@pytest.mark.parametrize("head", [0.0, 0.5])
def test_steady_period_without_a_flush(stages, micro_batches, head):
    costs = Costs(head=head)
    local = simulate(schedule_of(("local", None, micro_batches), stages=stages), costs)
    assert local.steady_period == micro_batches * (3 + head)
    if head == 0:
        assert local.idle_share == 0
    for window in (2, 3):
        if (
            window < stages - 1
        ):  # fewer interior segments than that leave no segment that passes everything on
            timeline = simulate(
                schedule_of(("interlocking", window, micro_batches), stages=stages), Costs()
            )
            interior = micro_batches * (3 + window - 1)
            assert (
                timeline.steady_period == interior
                if stages == 8 or window == 2
                else timeline.steady_period >= interior - 8
            )
            assert min(timeline.idle_share_of_stage) == 0 or stages == 4


def test_chunks_split_leave_no_bubble():
    """Hand-worked: two stages a chunk. 1F1B inside it wastes 3 ticks a step, split in the same
    memory 1, with one more live 0."""
    for stages in (2, 4, 8, 16):  # the longer the pipeline, the longer it takes to settle
        row = [(make_routes("chunked", stages, 2), 4)]
        periods = [
            simulate(make_schedule(row, stages, 0.0, split), Costs()).steady_period
            for split in (0, 1, 2)
        ]
        assert periods == [15, 13, 12]
        lives = [max(make_schedule(row, stages, 0.0, split).peak_live) for split in (0, 1, 2)]
        assert lives == [2, 2, 3]
    for per_stage in (2, 3):  # several segments on a stage defer as many micro-batches as one
        finer = make_schedule([(make_routes("backprop", 4 * per_stage), 16)], 4, 0.0, 2)
        assert max(finer.peak_live) == 7 * per_stage
        assert simulate(finer, Costs()).steady_period <= 16 * 3 * per_stage + per_stage
    upper = make_schedule([(make_routes("chunked", 4, 2), 4)], 4, 0.0, 2).stages[3]
    assert " ".join(map(str, upper)) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"


def test_segments_must_divide_evenly():
    with pytest.raises(ValueError, match="4 segments cannot be dealt evenly to 3 stages"):
        make_schedule([(make_routes("local", 4), 2)], 3)
    with pytest.raises(RouteError):
        make_routes("local", 0)


def random_case(rng):
    stages = rng.choice([1, 2, 3, 4, 5, 8])
    segments = stages * rng.choice([1, 1, 2, 3])
    micro_batches = rng.randint(1, 12)
    parts, left = [], micro_batches
    for _ in range(rng.choice([1, 1, 2, 3])):
        count = rng.randint(0, left)
        mode = rng.choice(MODES)
        windowed = mode in ("chunked", "shifted_chunked", "overlapping", "interlocking")
        window = rng.randint(1, segments) if windowed else None
        combine = rng.choice(["sum", "mean"]) if mode == "overlapping" else "sum"
        weights = (
            [rng.choice([0.0, 0.3, 1.0]) for _ in range(segments - 1)] + [1.0]
            if mode == "deep_supervision"
            else None
        )
        parts.append(
            (make_routes(mode, segments, window, combine, weights, step=rng.randint(0, 5)), count)
        )
        left -= count
    parts[-1] = (parts[-1][0], parts[-1][1] + left)
    return parts, stages


@pytest.mark.parametrize("seed", sampled(range(150), range(400)))
def test_no_deadlock_and_no_wrong_route(seed):
    rng = random.Random(seed)
    parts, stages = random_case(rng)
    transfer, split = rng.choice([0, 0, 0.5, 1, 3]), rng.choice([0, 1, 2])
    schedule = make_schedule(parts, stages, transfer, split)
    validate(
        schedule, 4 if split < 2 else 8
    )  # the default depth; wide overlapping rows that run ahead are told to raise it
    for depth in (1, 2, 3):  # a shorter link either works or is refused; it never hangs
        with contextlib.suppress(ScheduleError):
            validate(schedule, depth)
    _check_gradients_symbolically(schedule)
    _check_memory(schedule)


def _check_gradients_symbolically(schedule):
    """Execute the schedule on symbols: every segment must end with exactly the gradient its table
    demands."""
    arrived, learned, second_halves = {}, {}, set()
    for event in sorted(replay(schedule)[0], key=lambda e: (e.end, e.start)):
        action = event.action
        if action.kind == FORWARD:
            continue
        one = schedule.route(action)
        if action.kind == WEIGHT_GRADIENT:
            assert action not in second_halves
            second_halves.add(action)
            assert (action.segment, action.micro_batch) in learned  # its first half has run
            continue
        total = {}
        for loss, coefficient in one.reads:
            incoming = (
                {action.segment: 1.0}
                if loss == action.segment
                else arrived[action.segment, action.micro_batch, loss]
            )
            for source, weight in incoming.items():
                total[source] = total.get(source, 0.0) + coefficient * weight
        if one.weights:
            learned[action.segment, action.micro_batch] = total
        if one.sends is not None:
            arrived[action.segment - 1, action.micro_batch, one.sends] = {
                loss: w * one.send_scale for loss, w in total.items()
            }
    for (segment, micro_batch), total in learned.items():
        table = schedule.rows[micro_batch].weights
        expected = {loss: row[segment] for loss, row in table.items() if segment in row}
        assert total == pytest.approx(expected), (
            segment,
            micro_batch,
            str(schedule.rows[micro_batch]),
        )
    assert len(learned) == len(schedule.stage_of) * schedule.num_micro_batches


def _check_memory(schedule):
    """With one row, no stage keeps more micro-batches than there are stages up to its furthest
    loss, times its segments."""
    if len({id(routes) for routes in schedule.rows}) > 1 or any(
        a.kind == WEIGHT_GRADIENT for a in schedule.actions()
    ):
        return
    per_stage = len(schedule.stage_of) // schedule.num_stages
    for stage, live in enumerate(schedule.peak_live):
        segments = [s for s, p in enumerate(schedule.stage_of) if p == stage]
        reach = max(schedule.stage_of[s + schedule.rows[0].reach[s]] - stage + 1 for s in segments)
        assert live <= reach * per_stage


@pytest.mark.parametrize("seed", range(40))
def test_sums_are_taken_in_the_same_order_on_any_number_of_stages(seed):
    rng = random.Random(1000 + seed)
    segments = 4
    parts = [
        (
            make_routes(rng.choice(["backprop", "interlocking", "chunked"]), segments),
            rng.randint(1, 5),
        ),
        (make_routes("local", segments), rng.randint(1, 5)),
    ]
    orders, transfer, split = [], rng.choice([0, 1]), rng.choice([0, 1, 2])
    for stages in (1, 2, 4):
        schedule = make_schedule(parts, stages, transfer, split)
        validate(schedule, 4)
        orders.append(
            [
                [
                    a.micro_batch
                    for a in schedule.actions()
                    if a.segment == s and a.kind in kinds and schedule.route(a).weights
                ]
                for s in range(segments)
                for kinds in ((BACKWARD, INPUT_GRADIENT), (BACKWARD, WEIGHT_GRADIENT))
            ]
        )
        assert schedule.rows == make_schedule(parts, 4, transfer, split).rows
    assert orders[0] == orders[1] == orders[2]
