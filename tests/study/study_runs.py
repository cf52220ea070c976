"""A run of the quality study, for tests."""

from ds_local.study.runs import Run


def run_of(method, **changes):
    return Run("cpu", method, 4, 1, 2.0, 1.0)._replace(**changes)
