import json

import pytest
from commands import command

from ds_local.schedules.drawing import chrome_trace
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.replay import validate
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, simulate


def schedule_of(mode, micro_batches=8, stages=4, window=None, step=0):
    return make_schedule([(make_routes(mode, stages, window, step=step), micro_batches)], stages)


def run(*arguments):
    return command("simulate", *arguments)


def test_a_slow_stage_sets_the_period_and_the_others_idle():
    timeline = simulate(schedule_of("local"), Costs(forward=[1, 1, 2, 1]))
    assert timeline.steady_period == 8 * 4
    assert timeline.idle_share_of_stage == [0.25, 0.25, 0.0, 0.25]


def test_a_head_costs_its_own_segment_and_the_last_one_has_none():
    timeline = simulate(schedule_of("local"), Costs(head=0.5))
    assert timeline.busy == [28.0, 28.0, 28.0, 24.0]
    # the head of interlocking's loss 0 does not exist: it would train nobody
    assert simulate(schedule_of("interlocking", window=2), Costs(head=0.5)).busy[0] == 24.0


def test_a_slow_link_costs_local_training_nothing_until_it_is_the_bottleneck():
    assert simulate(schedule_of("local"), Costs(link=3)).steady_period == 24
    assert simulate(schedule_of("local"), Costs(link=4)).steady_period == 32
    # backpropagation waits for every round trip
    assert simulate(schedule_of("backprop"), Costs(link=3)).steady_period > 48


def test_the_optimizer_counts_once_a_step():
    assert simulate(schedule_of("local"), Costs(optimizer=2)).steady_period == 26


def test_a_full_link_holds_its_sender_back():
    slow_end = Costs(forward=[1, 5])
    unlimited, limited = (
        simulate(schedule_of("local", stages=2), slow_end, depth) for depth in (None, 1)
    )
    ahead = [max(e.end for e in t.events if e.stage == 0) for t in (unlimited, limited)]
    assert ahead == [
        24,
        1 + 6 * 7 + 2,
    ]  # micro-batch 7 leaves when micro-batch 6 is taken; then its own backward
    assert unlimited.steady_period == limited.steady_period == 8 * 7


def test_steps_that_differ_are_simulated_in_turn():
    steps = [schedule_of("shifted_chunked", window=2, step=step) for step in (0, 1)]
    alone = [simulate(step, Costs()).steady_period for step in steps]
    assert simulate(steps, Costs()).steady_period >= min(alone)
    assert simulate(steps[0], Costs()).busy == simulate(steps, Costs()).busy
    validate(steps, 2)


def test_phases_follow_each_other_without_a_deadlock():
    validate(
        [schedule_of("local"), schedule_of("backprop"), schedule_of("interlocking", window=3)], 1
    )


def test_a_profile_gives_the_costs(tmp_path):
    costs = {
        "forward": [1, 2],
        "input_grad": [1, 1],
        "weight_grad": [1, 1],
        "head": [0.5, 7.0],
        "link": [0, 0],
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"costs": costs}))
    assert simulate(schedule_of("local", stages=2), Costs.from_profile(path)).steady_period == 8 * (
        4 + 7
    )
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a profile"):
        Costs.from_profile(path)


def test_trace_has_a_lane_for_each_stage():
    trace = chrome_trace(simulate(schedule_of("local", 2, 3), Costs()))["traceEvents"]
    assert {e["tid"] for e in trace if e["ph"] == "X"} == {0, 1, 2}
    assert sum(e["dur"] for e in trace if e["ph"] == "X" and e["tid"] == 0) == 6e6


def test_command_line(tmp_path):
    png, trace = tmp_path / "a.png", tmp_path / "a.json"
    common = ["--stages", 4, "--micro-batches", 8, "--mode", "local", "--backprop-micro-batches", 2]
    result = run(
        *common, "--json", "-", "--png", png, "--trace", trace, "--compare", "1f1b", "zero_bubble"
    )
    assert result.returncode == 0, result.stderr
    mixed, plain, _ = json.loads(result.stdout)
    assert (mixed["makespan"], plain["makespan"]) == (27, 33)
    assert mixed["peak_live_micro_batches"] == [3, 3, 3, 1]
    assert plain["messages"] == {"activations": 24, "gradients": 24}
    assert {"steady_period", "idle_share"} <= set(mixed)
    assert png.stat().st_size > 10_000
    assert len(json.loads(trace.read_text())["traceEvents"]) == 4 * 8 * 2 + 4

    single = run(*common, "--json", tmp_path / "b.json")
    assert "stage 3" in single.stdout
    assert json.loads((tmp_path / "b.json").read_text())["makespan"] == 27


@pytest.mark.parametrize(
    ("stages", "micro_batches", "backprop"), [(4, 8, 1), (4, 8, 2), (4, 16, 4), (8, 16, 2)]
)
def test_an_order_that_reckons_with_the_link_hides_it(stages, micro_batches, backprop):
    """A message takes as long as a forward. Planned for free links, the gradients come too late in
    every step."""
    mix = [
        (make_routes("backprop", stages), backprop),
        (make_routes("local", stages), micro_batches - backprop),
    ]
    blind, seeing = (
        simulate(make_schedule(mix, stages, transfer), Costs(link=1.0)) for transfer in (0.0, 1.0)
    )
    assert seeing.steady_period == 3 * micro_batches
    assert blind.steady_period > 1.1 * seeing.steady_period
    assert max(seeing.schedule.peak_live) == max(blind.schedule.peak_live)


def test_command_line_with_a_model(tmp_path):
    small, config = tmp_path / "config.json", tmp_path / "ds_config.json"
    small.write_text(json.dumps({"model_type": "gpt2"}))
    config.write_text(json.dumps({"local_parallel": {"head": {"token_fraction": 0.0625}}}))
    common = [
        "--stages",
        4,
        "--micro-batches",
        8,
        "--mode",
        "local",
        "--compare",
        "1f1b",
        "--model",
        small,
        "--json",
        "-",
    ]
    full, backprop = json.loads(run(*common).stdout)
    sampled, _ = json.loads(run(*common, "--deepspeed_config", config).stdout)
    assert backprop["auxiliary_flops"] == [0, 0, 0, 0]
    assert full["auxiliary_flops"][3] == sampled["auxiliary_flops"][3] == 0
    # one head costs as much as 4.5 blocks; with 1 in 16 tokens less than a third of one, beside
    # three or four blocks
    assert full["auxiliary_flops"][0] > 0.5
    assert 0.05 < sampled["auxiliary_flops"][0] < 0.1
    assert sampled["steady_period"] < 0.8 * backprop["makespan"]
    # stages are cut for the mix, as in a run: one in which every micro-batch runs backpropagation
    # is cut as without heads
    mixed, backprop = json.loads(
        run(*common, "--compare", "backprop", "--backprop-micro-batches", 8).stdout
    )
    assert mixed["steady_period"] == backprop["steady_period"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "interlocking", "--window", 9], "window is 9"),
        (["--mode", "local", "--backprop-micro-batches", 9], "exceeds"),
        (
            ["--mode", "local", "--forward", 0, "--input-grad", 0, "--weight-grad", 0],
            "all costs are 0",
        ),
        (["--mode", "local", "--profile", "/nowhere"], "is not a profile"),
        (["--mode", "zero_bubble"], ""),
    ],
)
def test_command_line_mistakes(arguments, message):
    result = run("--stages", 4, "--micro-batches", 8, *arguments)
    assert (result.returncode == 1) == bool(message)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_thousand_stages_in_seconds():
    timeline = simulate(schedule_of("local", 8, 1024), Costs())
    assert timeline.steady_period == 24
    assert timeline.makespan == 8 * 3 + 1023
