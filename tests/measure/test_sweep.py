"""A sweep's settings and rows, from what made-up ranks return."""

import pytest

from ds_local.measure.emulated import period
from ds_local.measure.network import Shape
from ds_local.measure.sleeping import Times
from ds_local.measure.sweep import Setting, run_once, sweep
from ds_local.measure.systems import choose

TIMES = Times(0.5, 0.25, 0.25, floats=1000)


class Ranks:
    """Runs nothing: every step of a made-up rank ends a period after the one before."""

    def __init__(self, periods):
        self.periods, self.asked = list(periods), []

    def run(self, work, ranks, *arguments, timeout):
        self.asked.append((ranks, arguments, timeout))
        if not arguments:
            return []
        steps = arguments[3]
        one = self.periods.pop(0)
        return [{"ends": [one * (n + 1) for n in range(steps)]} for _ in range(ranks)]


def test_what_a_setting_takes_by_hand():
    setting = Setting(4, 8, TIMES, Shape(bits_per_second=64_000))
    assert setting.ideal_seconds == 8 * 1.0
    assert setting.link_seconds == 1000 * 32 / 64_000
    assert setting.steps() == (2, 2)
    assert Setting(8, 2, TIMES, Shape()).steps() == (5, 6)
    assert Setting(2, 2, TIMES, Shape()).link_seconds == 0.0


def test_each_repetition_takes_each_system_once(capsys):
    pool = Ranks([5.0, 8.0, 4.0, 10.0])
    setting = Setting(2, 4, TIMES, Shape())
    systems = choose(["ds_local:local", "ds_local:backprop"])
    (rows,) = sweep([setting], systems, 2, pool)
    assert [row["schedule"] for row in rows] == ["local", "backprop"]
    local, true = rows
    assert local["repetitions"] == pytest.approx([5.0, 4.0])
    assert local["step_seconds"] == pytest.approx(4.5)
    assert local["efficiency"] == pytest.approx(4.0 / 4.5)
    assert local["efficiency_highest"] == pytest.approx(1.0)
    assert true["efficiency_lowest"] == pytest.approx(0.4)
    assert local["simulated_efficiency"] == pytest.approx(1.0)
    assert true["simulated_efficiency"] == pytest.approx(4 / 5)  # a period of 4 + (2 - 1)
    assert (local["peak_live_micro_batches"], true["peak_live_micro_batches"]) == ([1, 1], [2, 1])
    assert capsys.readouterr().err.count("of ideal") == 4


def test_what_cannot_run_is_left_out_with_the_reason(capsys):
    systems = choose(["torch:DualPipeV", "ds_local:local"])
    (rows,) = sweep([Setting(2, 2, TIMES, Shape())], systems, 1, Ranks([3.0]))
    assert [row["schedule"] for row in rows] == ["local"]
    assert "left out: torch:DualPipeV needs at least 4" in capsys.readouterr().err


def test_the_limit_of_a_run_grows_with_what_it_takes():
    (local,) = choose(["ds_local:local"])[:1]
    pool = Ranks([1.0, 1.0])
    for delay in (0.0, 100.0):
        run_once(local, Setting(2, 4, TIMES, Shape(0.0, delay)), pool)
    (_, _, short), (_, _, long) = pool.asked
    assert short == 300 + 3 * (2 + 3) * 4 * 2 * 1.5
    assert long == short + 3 * (2 + 3) * 4 * 2 * 2 * 100.0


def test_the_period_is_between_the_counted_steps():
    assert period([{"ends": [1.0, 9.0, 11.0, 13.0]}], 2) == pytest.approx(2.0)
