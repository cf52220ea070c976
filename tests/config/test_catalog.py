"""The one table of schemes, and the lists that are made of it."""

import pytest

from ds_local.cluster.candidates import PLANNED
from ds_local.config.catalog import (
    SCHEMES,
    dropped_losses,
    fewest_micro_batches,
    head_of,
    name_of,
    section_of,
)
from ds_local.config.files import local_parallel
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError
from ds_local.measure import real_systems
from ds_local.measure.systems import SYSTEMS
from ds_local.schedules.run_plan import RunPlan
from ds_local.study.methods import METHODS

ADDED = {"data parallel"}  # a layout, not a scheme of its own


def scheme_in(name):
    """The longest name of a scheme that a longer name begins with."""
    return max(
        (s for s in SCHEMES if name == s or name.startswith(f"{s}, ")), key=len, default=None
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_can_be_run(name):
    section = section_of(SCHEMES[name].section, 8)
    assert RunPlan(local_parallel({SECTION: section}), 4, 8).schedules
    assert SCHEMES[name].sentence.endswith(".")


@pytest.mark.parametrize("name", SCHEMES)
def test_a_name_says_mode_window_and_options(name):
    section = SCHEMES[name].section
    if not {"mix", "phases"} & section.keys() and name not in ADDED:
        assert f"{name}, ".startswith(f"{name_of(section)}, ")


def test_shares_are_numbers_of_micro_batches():
    quarter = SCHEMES["mixed 1/4"].section
    assert fewest_micro_batches(quarter) == 4
    counts = {m: section_of(quarter, m)["mix"][0]["micro_batches"] for m in (1, 4, 7, 8, 16)}
    assert counts == {1: 1, 4: 1, 7: 1, 8: 2, 16: 4}
    assert quarter["mix"][0] == {"mode": "backprop", "share": 0.25}  # as it was
    assert fewest_micro_batches(SCHEMES["local"].section) == 1


def test_planner_study_and_benchmark_use_its_names():
    assert set(PLANNED) <= set(SCHEMES)
    ours = [system.schedule for system in SYSTEMS if system.owner == "ds_local"]
    ours += [name for owner, name in real_systems.SYSTEMS if owner == "ds_local"]
    assert all(map(scheme_in, ours))
    for name, method in METHODS.items():
        if not method.renew:
            assert SCHEMES[scheme_in(name)].section == method.scheme, name


def test_losses_are_dropped_from_the_bottom_up():
    """Loss l of K is gone after l / 2K of the steps."""
    phases = dropped_losses(4, 8000)
    assert phases == [
        {"mode": "deep_supervision", "weights": [1, 1, 1, 1], "until_step": 1000},
        {"mode": "deep_supervision", "weights": [0, 1, 1, 1], "until_step": 2000},
        {"mode": "deep_supervision", "weights": [0, 0, 1, 1], "until_step": 3000},
        {"mode": "backprop"},
    ]
    plan = RunPlan(local_parallel({SECTION: {"phases": phases}}), 4, 8)
    tables = [plan.rows_at(step)[0][0].weights for step in (0, 999, 1000, 2999, 3000, 7999)]
    assert [sorted(table) for table in tables] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 2, 3],
        [2, 3],
        [3],
        [3],
    ]
    assert all(
        table[loss] == dict.fromkeys(range(loss + 1), 1.0) for table in tables for loss in table
    )
    assert [phase.get("until_step") for phase in dropped_losses(2, 100, 0.8)] == [40, None]
    assert dropped_losses(1, 100) == [{"mode": "backprop"}]


@pytest.mark.parametrize(("steps", "by"), [(4, 0.5), (0, 0.5), (100, 0.0), (100, 1.5)])
def test_losses_that_cannot_be_dropped_one_by_one_are_refused(steps, by):
    with pytest.raises(ConfigError, match="too few to drop 7 of them one by one; take more steps"):
        dropped_losses(8, steps, by)


def test_a_share_of_a_vocabulary_is_a_number_of_tokens():
    assert head_of({"vocabulary": 0.125, "rank": 4}, 4096) == {"vocabulary": 512, "rank": 4}
    assert head_of({"vocabulary": 0.001}, 64) == {"vocabulary": 1}
    assert head_of({"vocabulary": 8}, 64) == {"vocabulary": 8}
    assert head_of({}, 64) == {}
