"""Copies of other segments' weights in heads: which, and how often they are made anew."""

from ds_local.config.files import local_parallel
from ds_local.replicas.head_copies import planned_copies, refresh_delay


def test_planned_copies_and_their_delay():
    section = local_parallel(
        {
            "local_parallel": {
                "head": {"readout": "shared", "blocks": [1, 0, 1], "blocks_from": "next_tracked"}
            }
        }
    )
    assert list(map(str, planned_copies(section, 4, {0, 1, 2}))) == [
        "readout copy 3 -> 0",
        "blocks copy 1 -> 0",
        "readout copy 3 -> 1",
        "readout copy 3 -> 2",
        "blocks copy 3 -> 2",
    ]
    assert refresh_delay(1, 8, 4) == 1
    assert refresh_delay(4, 8, 4) == 4
    assert refresh_delay(4, 1, 4) == 25
