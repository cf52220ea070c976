"""Which cases of a matrix are in every run of the tests: those that stand for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def sampled(chosen: Sequence[Any], cases: Sequence[Any]) -> list[Any]:
    """The chosen ones are in every run, the others are slow."""
    assert all(case in cases for case in chosen)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[] if case in chosen else pytest.mark.slow,
        )
        for case in cases
    ]
