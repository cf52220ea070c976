"""Figures on their way: a NaN arrives as a NaN, and what is not there as not there."""

import math

from ds_local.engine.reports import FIGURES, from_row, to_row


def test_nan_is_not_absence():
    figures = {"step": 3, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0, "skipped": 1}
    found = from_row(to_row(figures))
    assert math.isnan(found.pop("loss"))
    assert found == dict.fromkeys(name for name in FIGURES if name != "loss") | {
        "step": 3.0,
        "grad_norm": math.inf,
        "lr": 0.0,
        "skipped": 1.0,
    }


def test_all_and_none():
    full = {name: float(number) for number, name in enumerate(FIGURES)}
    assert from_row(to_row(full)) == full
    assert from_row(to_row({})) == dict.fromkeys(FIGURES)
