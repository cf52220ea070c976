"""What a report says to look at next."""

import pytest
from written_runs import write_run

from ds_local.training.report_advice import what_next
from ds_local.training.run_record import RunRecord


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"event": 13},
            "Numbers were not finite, 1 times in the reports, first at step 13: loss of segment 1",
        ),
        ({"rising": True}, "was best at step 20 (5.2000) and is 5.4000 now"),
        ({}, "Stage 1 is the idlest: it waits 40% of its time, mostly for the activation link 0"),
        ({}, "Stage 0 waits least (2%), so it has the most work"),
        ({"idle": (0.01, 0.02)}, "No stage waits much: the idlest, stage 1, 2.0% of its time."),
        ({"idle": (0.1, 0.13), "mode": "backprop"}, "The schedule alone explains 11%"),
        ({"idle": (0.3, 0.4)}, "All stages wait alike"),
    ],
    ids=["event", "rising", "idlest", "why", "busy", "schedule", "links"],
)
def test_it_says_where_to_look(tmp_path, options, said):
    told = " ".join(what_next(RunRecord(write_run(tmp_path / "run", **options))))
    assert said in told
