"""A start of a unit that is a job of its own: options that go together, units that belong together,
and one that dies again and again."""

from datetime import datetime, timedelta, timezone

import pytest

from ds_local.cli.train import parse_arguments
from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError, RunError
from ds_local.training.run_folder import RunFolder
from ds_local.training.units import check_flapping, check_unit, start_of_unit, with_facts

NEEDED = ["--model", "m", "--data", "d", "--output", "o", "--deepspeed_config", "c"]
NEEDED += ["--max-steps", "5"]


def arguments(*more):
    return parse_arguments([*NEEDED, *more])


def config_of(seconds=600.0, **section):
    link = {"link": {"reconnect_seconds": seconds}} if seconds else {}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "local_parallel": {"mode": "local", **link, **section},
    }


def section_of(seconds=600.0):
    return local_parallel(config_of(seconds))


@pytest.mark.parametrize(
    ("words", "seconds", "said"),
    [
        ([], 600.0, "reconnect_seconds is 600, so every unit of stages is a job of its own: give"),
        (
            ["--unit", "1"],
            0.0,
            r"--unit 1 is a job of its own, .*; set .*reconnect_seconds",
        ),
        (["--unit", "1", "--keep-best"], 60.0, "--keep-best needs the whole model in one job"),
        (
            ["--unit", "1", "--eval-every", "1", "--stop-after-worse", "2"],
            60.0,
            "--stop-after-worse needs the whole",
        ),
        (["--unit", "1", "--sample-tokens", "2"], 60.0, "--sample-tokens needs the whole model"),
        (["--unit", "1", "--profile"], 60.0, "--profile needs the whole model in one job"),
        (["--unit", "1", "--dry-run"], 60.0, "--dry-run needs the whole model in one job"),
        (["--replicas", "2"], 0.0, r"--replicas 2 and --replica 0 say which copy .* no --unit"),
        (["--replicas", "2", "--replica", "1"], 0.0, "no --unit; leave them out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, seconds, said):
    with pytest.raises(ConfigError, match=said):
        check_unit(arguments(*words), section_of(seconds))


def test_options_that_go_together():
    check_unit(arguments(), section_of(0.0))
    check_unit(arguments("--unit", "0", "--resume", "--eval-every", "3"), section_of())


def test_the_engine_of_a_unit_has_the_sizes_of_a_step(tmp_path):
    args = arguments("--unit", "1", "--num-stages", "3")
    args.output = str(tmp_path / "run")
    config = {**config_of(), "train_batch_size": 6}
    unit, own = start_of_unit(args, config, section_of(), 1)
    assert (unit.stages, unit.num_stages) == (range(1, 2), 3)
    assert unit.meets_in == str(tmp_path / "run")
    assert "train_batch_size" not in own
    assert own["gradient_accumulation_steps"] == 3
    with pytest.raises(ConfigError, match="be counted from its processes; give --num-stages"):
        start_of_unit(arguments("--unit", "1"), config_of(), section_of(), 1)


def test_replicas_that_are_jobs_weigh_no_tokens():
    args = arguments("--unit", "1", "--num-stages", "3", "--replicas", "2")
    config = config_of(loss_weighting="token")
    with pytest.raises(ConfigError, match=r'loss_weighting is "token", but --replicas 2 are jobs'):
        start_of_unit(args, config, local_parallel(config), 1)
    alone = arguments("--unit", "1", "--num-stages", "3")
    assert start_of_unit(alone, config, local_parallel(config), 1)[0].number == 1


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"bf16": {"enabled": True}}, "but bf16 is on"),
        ({"bfloat16": {"enabled": True}}, "but bf16 is on"),  # its old name
        ({"zero_optimization": {"stage": 1}}, "but zero_optimization is on"),
        ({"bf16": {"enabled": False}}, None),
    ],
)
def test_replicas_that_are_jobs_average_in_fp32(more, named):
    config = {**config_of(), **more}
    alone = arguments("--unit", "1", "--num-stages", "3")
    assert start_of_unit(alone, config, section_of(), 1)[0].number == 1
    args = arguments("--unit", "1", "--num-stages", "3", "--replicas", "2")
    if named is None:
        start_of_unit(args, config, section_of(), 1)
        return
    with pytest.raises(ConfigError, match=named):
        start_of_unit(args, config, section_of(), 1)


def test_ranks_of_a_unit_wait_as_long_as_for_another_unit_and_more():
    link = section_of(600.0).link
    assert link.wait_seconds == link.timeout_seconds + 600
    assert section_of(0.0).link.wait_seconds == link.timeout_seconds


def test_all_units_must_have_the_same(tmp_path):
    args = arguments("--unit", "1", "--num-stages", "3")
    unit, config = start_of_unit(args, config_of(), section_of(), 1)
    facts = {"config": config, "model": {}, "data": {"fingerprint": "f"}}
    known = with_facts(unit, facts, args).facts
    other = arguments("--unit", "2", "--num-stages", "3", "--save-every", "7", "--keep-last", "2")
    assert with_facts(unit, facts, other).facts == known
    for changed in (
        ({**facts, "data": {"fingerprint": "g"}}, args),
        ({**facts, "config": config_of(seed=3)}, args),
        (facts, arguments("--unit", "1", "--num-stages", "3", "--eval-every", "2")),
    ):
        assert with_facts(unit, *changed).facts != known


def ago(**how):
    return {"time": (datetime.now(timezone.utc) - timedelta(**how)).isoformat(timespec="seconds")}


def test_a_unit_that_dies_again_and_again_is_refused():
    recorded = {"starts": [ago(hours=2), ago(minutes=59), ago(minutes=10)]}
    check_flapping(recorded, 3)
    check_flapping(recorded, 0)
    check_flapping(None, 1)
    check_flapping({}, 1)
    with pytest.raises(RunError, match=r"was started 2 times within the last hour, first at .*see"):
        check_flapping(recorded, 2)


def test_one_job_does_not_begin_beside_units_without_their_checkpoint(tmp_path):
    (tmp_path / "unit-0").mkdir()
    with pytest.raises(
        RunError, match=r"make one with ds-local gather .*, or start units with --unit"
    ):
        RunFolder(tmp_path, print).begins_at(resume=True)
