"""Schedules of rows, for the tests of what is made of them."""

from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import make_routes


def schedule_of(*parts, stages, segments=None, split=0):
    """parts: (mode, window, micro-batches)."""
    mix = [(make_routes(mode, segments or stages, window), count) for mode, window, count in parts]
    return make_schedule(mix, stages, split_backward=split)
