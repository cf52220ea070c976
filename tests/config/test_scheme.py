"""Schemes: rows, mixes, and what goes with them."""

import pytest

from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError
from ds_local.schedules.run_plan import RunPlan


def test_auto_is_refused_where_it_means_nothing():
    auto, local = {"mode": "backprop", "micro_batches": "auto"}, {"mode": "local"}
    for mix in (
        [auto],
        [local, auto],
        [auto, {**local, "micro_batches": 2}],
        [auto, auto],
        [auto, local, {**local, "micro_batches": 1}],
    ):
        with pytest.raises(
            ConfigError, match=r'"auto" is for the first of two|at most one entry without'
        ):
            local_parallel({"local_parallel": {"mix": mix}})
    with pytest.raises(ConfigError, match="8 segments and 4 micro-batches not one can be hidden"):
        RunPlan(local_parallel({"local_parallel": {"mix": [auto, local]}}), 8, 4).schedule_at(0)
