"""The one table of schemes, and the lists that are made of it."""

import pytest

from ds_local.cluster.candidates import ROWS
from ds_local.config.catalog import SCHEMES, fewest_micro_batches, name_of, section_of
from ds_local.config.files import local_parallel
from ds_local.config.strict import SECTION
from ds_local.measure import real_systems
from ds_local.measure.systems import SYSTEMS
from ds_local.schedules.run_plan import RunPlan
from ds_local.study.methods import METHODS

ADDED = {"data parallel"}  # a layout, not a row of its own


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
    assert set(ROWS) <= set(SCHEMES)
    ours = [system.schedule for system in SYSTEMS if system.owner == "ds_local"]
    ours += [name for owner, name in real_systems.SYSTEMS if owner == "ds_local"]
    assert all(map(scheme_in, ours))
    for name, method in METHODS.items():
        if not method.renew:
            assert SCHEMES[scheme_in(name)].section == method.scheme, name
