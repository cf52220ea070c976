"""Traces for Chrome and Perfetto."""

from ds_local.charts.traces import lane, span


def test_a_lane_has_a_name_and_what_is_in_it_a_time_in_microseconds():
    assert lane(2)["args"] == {"name": "stage 2"}
    found = span("F0", 2, 0.5, 2.0, replica=1, args={"step": 3})
    assert (found["pid"], found["tid"], found["ts"], found["dur"]) == (1, 2, 5e5, 1.5e6)
    assert found["args"] == {"step": 3}
    assert span("F0", 2, 0.5, 2.0, unit=10)["dur"] == 15
