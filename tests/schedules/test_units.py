"""Units of stages: which stages live and die together."""

import pytest

from ds_local.config.catalog import SCHEMES, section_of
from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.units import check_units, folder_of, unit_folders, unit_of, units_of


def plan_of(section, stages=4, micro_batches=8):
    return RunPlan.of(local_parallel({"local_parallel": section}), stages, micro_batches)


def units(section, stages=4):
    return [list(unit) for unit in units_of(plan_of(section, stages))]


@pytest.mark.parametrize(
    ("section", "stages", "expected"),
    [
        ({"mode": "local"}, 3, [[0], [1], [2]]),
        ({"mode": "local", "segments_per_stage": 2}, 2, [[0], [1]]),
        ({"mode": "chunked", "window": 2}, 4, [[0, 1], [2, 3]]),
        ({"mode": "chunked", "window": 2}, 5, [[0, 1], [2, 3], [4]]),
        ({"mode": "chunked", "window": 3}, 4, [[0, 1, 2], [3]]),
        # a chunk of two segments that one stage holds
        ({"mode": "chunked", "window": 2, "segments_per_stage": 2}, 3, [[0], [1], [2]]),
        (
            {"phases": [{"until_step": 9, "mode": "local"}, {"mode": "chunked", "window": 2}]},
            4,
            [[0, 1], [2, 3]],
        ),
    ],
)
def test_stages_between_which_a_gradient_crosses_are_one_unit(section, stages, expected):
    assert units(section, stages) == expected


@pytest.mark.parametrize(
    "section",
    [
        {"mode": "backprop"},
        {"mode": "interlocking"},
        {"mode": "overlapping"},
        {"mode": "deep_supervision"},
        {"mode": "shifted_chunked", "window": 2},
        {"mode": "chunked", "window": 4},
        {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
        {"phases": [{"until_step": 9, "mode": "local"}, {"mode": "backprop"}]},
    ],
)
def test_where_all_are_one_that_is_refused(section):
    with pytest.raises(ConfigError, match="gradients cross between all 4 stages in some step; use"):
        units(section)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_units_that_make_up_its_stages_or_is_refused(name):
    plan = plan_of(section_of(SCHEMES[name].section, 8))
    crossed = {link.lower for link in plan.gradient_links}
    if len(crossed) == plan.num_segments - 1:
        with pytest.raises(ConfigError, match="gradients cross between all 4 stages"):
            units_of(plan)
    else:
        found = units_of(plan)
        assert [stage for unit in found for stage in unit] == [0, 1, 2, 3]
        assert len(found) == plan.num_segments - len(crossed)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"head": {"readout": "shared"}}, "head.readout or head.blocks_from as it is heads take"),
        ({"mode": "chunked", "window": 2, "run_ahead": 1}, "run_ahead as it is steps overlap"),
        ({"diagnostics": True}, "diagnostics as it is probes go through the whole model"),
        ({"link": {"past_host": True}}, "link.past_host as it is NCCL groups"),
        ({"replicas": {"sync": "subnets"}}, "replicas.sync as it is replicas meet in groups"),
    ],
)
def test_what_needs_all_stages_in_one_job_is_refused(section, said):
    plan = plan_of({"mode": "local", **section})
    with pytest.raises(ConfigError, match=said) as caught:
        check_units(plan.section, plan)
    assert str(caught.value).endswith("change that, or leave reconnect_seconds 0")


def of(number, processes, section=None, **more):
    plan = plan_of({"mode": "chunked", "window": 2} if section is None else section)
    return unit_of(plan.section, plan, number, processes, **more)


def test_the_unit_of_a_job():
    unit = of(1, 2)
    assert (unit.stages, unit.num_stages) == (range(2, 4), 4)
    assert (str(unit), unit.name_of(0)) == ("unit 1", "unit 0")
    unit = of(3, 1, {"mode": "local"}, replica=1, num_replicas=2)
    assert str(unit) == "unit 3 of replica 1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((2, 2), "--unit 2 does not exist: this scheme on 4 stages has 2 units, from 0 to 1"),
        ((1, 1), r"unit 1 has 2 stages \(2, 3\) but this job has 1 processes; start one process"),
        ((1, 2, None, 0, 2), "with 2 replicas every unit must be one stage"),
        ((1, 1, {"mode": "local"}, 2, 2), "--replica 2 of 2 does not exist; count from 0"),
    ],
)
def test_a_job_that_is_no_unit_is_refused(arguments, said):
    number, processes, *more = arguments
    names = ("section", "replica", "num_replicas")
    with pytest.raises(ConfigError, match=said):
        of(number, processes, **dict(zip(names, more, strict=False)))


def test_folders_of_units_are_found_by_their_names(tmp_path):
    for unit in (0, 1, 10):
        (tmp_path / folder_of(unit, 0, 1)).mkdir()
    (tmp_path / "unit-2").write_text("no folder")
    (tmp_path / "unit-x").mkdir()
    assert {n: [p.name for p in found] for n, found in unit_folders(tmp_path).items()} == {
        0: ["unit-0"],
        1: ["unit-1"],
        10: ["unit-10"],
    }
    for replica in (1, 0):
        (tmp_path / folder_of(4, replica, 2)).mkdir()
    names = [path.name for path in unit_folders(tmp_path)[4]]
    assert names == ["unit-4-replica-0", "unit-4-replica-1"]
    assert unit_folders(tmp_path / "nowhere") == {}
