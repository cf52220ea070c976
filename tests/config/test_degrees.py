"""How processes divide into stages and replicas."""

import pytest

from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.schema import LocalParallelConfig
from ds_local.errors import ConfigError


def section(**given):
    return LocalParallelConfig.model_validate(given)


@pytest.mark.parametrize(
    ("given", "processes", "asked", "found"),
    [
        ({}, 4, None, (4, 1)),
        ({}, 4, 2, (2, 2)),
        ({"num_stages": 2}, 6, None, (2, 3)),
        ({"num_stages": 2}, 6, 2, (2, 3)),
        ({"num_stages": 1}, 3, None, (1, 3)),
    ],
)
def test_stages_times_replicas_are_the_processes(given, processes, asked, found):
    assert num_stages_and_replicas(section(**given), processes, asked) == found


@pytest.mark.parametrize(
    ("given", "processes", "asked", "said"),
    [
        ({"num_stages": 4}, 6, None, "6 processes cannot be divided into 4 stages"),
        ({"num_stages": 2}, 4, 4, "num_stages is 4 but local_parallel.num_stages is 2"),
        ({}, 4, "2", "num_stages"),
    ],
)
def test_what_does_not_fit_is_said(given, processes, asked, said):
    with pytest.raises(ConfigError, match=said):
        num_stages_and_replicas(section(**given), processes, asked)
