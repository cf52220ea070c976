"""`RunPlan`: what a "local_parallel" section comes to for a number of stages and micro-batches.

The section says what a user wants; the plan says what every stage does in every step: the rows of
the step's micro-batches, their schedule, the heads, the gradient links. Made once per rank
(`RunPlan.of` keeps them) and handed on.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from itertools import takewhile

from ds_local.config.schema import LocalParallelConfig
from ds_local.config.scheme import Row, Scheme
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError, counted
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.routes import Routes, corrected, make_routes
from ds_local.schedules.run_ahead import make_run_ahead
from ds_local.schedules.schedule import Link, Schedule
from ds_local.schedules.sheets import placement_in, read_schedule
from ds_local.schedules.simulator import most_without_idling

Rows = list[tuple[Routes, int]]  # (table, micro-batches that follow it)
PLAIN_MODES = ("backprop", "local", "deep_supervision")
MOST_SEGMENTS = 2**10
MOST_FORWARDS = 2**18  # of all schedules of a run; more take minutes to make and gigabytes to hold


class RunPlan:
    """The schedules of a run.

    Args:
        section: the "local_parallel" section.
        num_stages: pipeline stages; each holds `section.segments_per_stage` segments.
        num_micro_batches: of a step.

    Raises:
        ConfigError: when the schedules would be too large to hold; RouteError when a row does not
            fit the number of segments.
    """

    def __init__(
        self, section: LocalParallelConfig, num_stages: int, num_micro_batches: int
    ) -> None:
        self.section = section
        self.num_stages = num_stages
        self.num_segments = num_stages * section.segments_per_stage
        self.num_micro_batches = num_micro_batches
        check_size(section, self.num_segments, num_micro_batches)
        self._schedules: dict[tuple[int, int], Schedule] = {}

    @staticmethod
    @cache
    def of(section: LocalParallelConfig, num_stages: int, num_micro_batches: int) -> RunPlan:
        """The plan of these three, made once in a process."""
        return RunPlan(section, num_stages, num_micro_batches)

    def rows_at(self, step: int) -> Rows:
        """The tables of one step's micro-batches.

        Raises:
            ConfigError: when a mix does not add up to the step's micro-batches, or its "auto" can
                hide none; RouteError when a row does not fit the number of segments.
        """
        rows = self._rows(self.section.scheme_at(step), step)
        return [part for row in rows for part in _thinned(*row, self.section.head.every)]

    def key_at(self, step: int) -> tuple[int, int]:
        """Steps with equal keys have equal schedules: the phase, and where shifted chunks are."""
        section = self.section
        scheme = section.scheme_at(step)
        phases = enumerate(section.phases or ())
        return next((i for i, phase in phases if phase is scheme), -1), step % scheme.period

    def schedule_at(self, step: int) -> Schedule:
        """The schedule of one step, for all stages; where forwards run ahead, that of a step in the
        middle of a stretch. Raises as `rows_at` does."""
        key = self.key_at(step)
        if key not in self._schedules:
            self._schedules[key] = self._given(key, self._own(step))
        return self._schedules[key]

    def _own(self, step: int) -> Schedule:
        transfer, split_backward = self.section.link.transfer, self.section.split_backward
        rows, ahead = self.rows_at(step), self.section.scheme_at(step).run_ahead
        if ahead:
            limit = None if ahead == "auto" else ahead
            return make_run_ahead(rows, self.num_stages, limit, transfer)
        return make_schedule(rows, self.num_stages, transfer, split_backward)

    def _given(self, key: tuple[int, int], own: Schedule) -> Schedule:
        """What a file says in place of our own schedule."""
        paths = files_of(self.section)
        if not paths:
            return own
        keys = [self.key_at(step) for step in self.section.distinct_steps()]
        if len(paths) != len(keys):
            raise ConfigError(
                f"{SECTION}.schedule names {len(paths)} files, but the run has {len(keys)} "
                "schedules that follow each other; give one for each, in their order"
            )
        path = paths[keys.index(key)]
        found = read_schedule(path, own, self.section.link.depth)
        if found.stage_of != stages_of_segments(self.section, self.num_stages):
            raise ConfigError(
                f"{SECTION}.schedule: {path} deals segments to stages as {found.stage_of}, "
                f"{paths[0]} otherwise; they cannot move while a run goes on"
            )
        if not self.section.split_backward and any(found.peak_deferred):
            raise ConfigError(
                f"{SECTION}.schedule: {path} splits backwards into I and W; set "
                f"{SECTION}.split_backward to 1"
            )
        return found

    def rate_factor(self, segment: int, step: int) -> float:
        """Of a segment's learning rate, for the delay of its gradients; see `delay_discount`."""
        delay = self.schedule_at(step).delays[segment]
        return (1 + delay) ** -self.section.scheme_at(step).delay_discount

    @property
    def schedules(self) -> list[Schedule]:
        """Every schedule of the run, in the order in which they first come."""
        return [self.schedule_at(step) for step in self.section.distinct_steps()]

    @cached_property
    def steps_ahead(self) -> int:
        """The most steps that a forward runs ahead, in the whole run."""
        return max(schedule.steps_ahead for schedule in self.schedules)

    @cached_property
    def notes(self) -> list[str]:
        """What rows come to on this number of segments, where a plainer one is the same."""
        count = self.num_segments
        rows = (row for _, scheme in self.section.schemes() for row in scheme.mix or [scheme])
        found = dict.fromkeys((routes_of(row, count).mode, _plainer(row, count)) for row in rows)
        where = f"on {counted(count, 'segment')}"
        notes = [f"{where} {row} is the same as {plain}" for row, plain in found if plain]
        for path, schedule in zip(files_of(self.section), self.schedules, strict=False):
            live = ", ".join(map(str, schedule.peak_live))
            notes.append(f"schedule of {path}: live micro-batches by stage {live}")
        return notes

    @cached_property
    def probe_schedules(self) -> list[Schedule]:
        """Of one micro-batch, for diagnostics: the first row that is not backprop, and backprop."""
        true = make_routes("backprop", self.num_segments)
        rows = (row for _, scheme in self.section.schemes() for row in scheme.mix or [scheme])
        tables = (routes_of(row, self.num_segments) for row in rows)
        local = next((routes for routes in tables if routes.weights != true.weights), true)
        return [make_schedule([(routes, 1)], self.num_stages) for routes in (local, true)]

    @cached_property
    def gradient_links(self) -> list[Link]:
        """The links that carry gradients in some step, probes included."""
        schedules = self.schedules + (self.probe_schedules if self.section.diagnostics else [])
        sent = {schedule.sends(action) for schedule in schedules for action in schedule.actions()}
        return sorted(link for link in sent if link is not None and link.kind == "gradient")

    def _rows(self, scheme: Scheme, step: int) -> Rows:
        if scheme.mix is None:
            return [(routes_of(scheme, self.num_segments, step), self.num_micro_batches)]
        tables = [routes_of(entry, self.num_segments, step) for entry in scheme.mix]
        counts = [
            self._hidden(scheme.mix[0], scheme.mix[1])
            if entry.micro_batches == "auto"
            else entry.micro_batches
            for entry in scheme.mix
        ]
        given = sum(count or 0 for count in counts)
        rest = self.num_micro_batches - given
        if rest < 0 or (rest > 0 and None not in counts):
            raise ConfigError(
                f"{SECTION}.mix names {given} micro-batches but gradient_accumulation_steps is "
                f"{self.num_micro_batches}; make them agree, or leave micro_batches out of one "
                "entry"
            )
        followers = [rest if count is None else count for count in counts]
        if scheme.correction and followers[0]:
            share = self.num_micro_batches / followers[0]
            tables[0] = corrected(tables[0], tables[1], share, scheme.correction)
        return list(zip(tables, followers, strict=True))

    def _hidden(self, first: Row, second: Row) -> int:
        """How many micro-batches may follow the first row without idling."""
        link, split_backward = self.section.link, self.section.split_backward
        return _most_hidden(
            first, second, self.num_segments, self.num_micro_batches, link.transfer, split_backward
        )


@cache
def _most_hidden(
    first: Row,
    second: Row,
    num_segments: int,
    num_micro_batches: int,
    transfer: float,
    split_backward: int,
) -> int:
    tables = routes_of(first, num_segments), routes_of(second, num_segments)
    count = most_without_idling(*tables, num_micro_batches, transfer, split_backward)
    if not count:
        raise ConfigError(
            f"{SECTION}.mix: with {num_segments} segments and {num_micro_batches} micro-batches "
            'not one can be hidden; name a number instead of "auto", or raise '
            "gradient_accumulation_steps"
        )
    return count


def routes_of(row: Row, num_segments: int, step: int = 0) -> Routes:
    """The table of a config's row. Raises RouteError when it does not fit the segments."""
    return make_routes(row.mode, num_segments, row.window, row.combine, row.weights, step)


def _plainer(row: Row, num_segments: int) -> str | None:
    """A plainer mode, without options, that is the same table as this row in every step."""
    tables = [routes_of(row, num_segments, step) for step in range(row.period)]
    for mode in takewhile(lambda mode: mode != row.mode, PLAIN_MODES):
        plain = make_routes(mode, num_segments)
        same = (t.weights == plain.weights and t.loss_weights == plain.loss_weights for t in tables)
        if all(same):
            return mode
    return None


def files_of(section: LocalParallelConfig) -> tuple[str, ...]:
    """The files of a run's schedules, if they are given."""
    given = section.schedule or ()
    return (given,) if isinstance(given, str) else given


def stages_of_segments(section: LocalParallelConfig, num_stages: int) -> tuple[int, ...]:
    """Segment -> stage: in order, unless a schedule's file deals them otherwise.

    Raises:
        ScheduleError: when that file cannot be read.
    """
    per_stage = section.segments_per_stage
    for path in files_of(section):
        return placement_in(path, num_stages, num_stages * per_stage)
    return tuple(segment // per_stage for segment in range(num_stages * per_stage))


def check_size(section: LocalParallelConfig, num_segments: int, num_micro_batches: int = 1) -> None:
    """Before anything of this size is made, refuse schedules that could not be held.

    Raises:
        ConfigError, RouteError: with the numbers.
    """
    if num_segments > MOST_SEGMENTS:
        raise ConfigError(
            f"{num_segments} segments are more than {MOST_SEGMENTS}; lower num_stages or "
            "segments_per_stage"
        )
    schemes = [scheme for _, scheme in section.schemes()]
    for row in (row for scheme in schemes for row in scheme.mix or [scheme]):
        routes_of(row, num_segments)
    number = sum(scheme.period for scheme in schemes)
    if number * num_segments * num_micro_batches > MOST_FORWARDS:
        raise ConfigError(
            f"gradient_accumulation_steps of {num_micro_batches} on {num_segments} segments in "
            f"{counted(number, 'schedule')} are "
            f"{number * num_segments * num_micro_batches} forwards to plan, more than "
            f"{MOST_FORWARDS}; use fewer and larger micro-batches"
        )


def head_segments(section: LocalParallelConfig, num_segments: int) -> set[int]:
    """Segments with an auxiliary head: before the last, with a loss that trains in any phase.

    Raises:
        RouteError: when a row does not fit the number of segments.
    """
    check_size(section, num_segments)
    losses: set[int] = set()
    for step in section.distinct_steps():
        scheme = section.scheme_at(step)
        for row in scheme.mix or [scheme]:
            losses.update(routes_of(row, num_segments, step).losses)
    return losses - {num_segments - 1}


def _thinned(routes: Routes, count: int, every: int) -> Rows:
    """`count` micro-batches of which one in `every` has auxiliary losses."""
    kept = math.ceil(count / every)
    if kept == count or not set(routes.losses) - {routes.num_segments - 1}:
        return [(routes, count)]
    return [
        (routes.scaled_auxiliary(count / kept), kept),
        (routes.scaled_auxiliary(0), count - kept),
    ]
