"""What a schedule costs: a schedule and a cost model in, a time line out.

`simulate` replays a `Schedule` (the same object the engine executes) with given times for forward,
input gradient, weight gradient, head and link, and reports makespan, steady period, idle share,
live micro-batches and messages. The times are plain numbers in any unit, or come from a profile
that `train.py --profile` has measured.

Pure Python; matplotlib is imported only to draw.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.replay import replay
from ds_local.schedules.routes import Routes
from ds_local.schedules.schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Event,
    Link,
    Schedule,
)

MAX_ROUNDS = 8  # of a steady-state replay, beyond the least


@dataclass(frozen=True)
class Costs:
    """Times per segment and micro-batch, all in one unit; one number stands for every segment."""

    forward: float | Sequence[float] = 1.0
    input_grad: float | Sequence[float] = 1.0
    weight_grad: float | Sequence[float] = 1.0
    head: float | Sequence[float] = (
        0.0  # auxiliary head with its loss and gradients; the last segment's readout is not one
    )
    link: float | Sequence[float] = (
        0.0  # time one message keeps the link above a segment busy, per direction
    )
    optimizer: float | Sequence[float] = (
        0.0  # reduction and optimizer step, once per step and segment
    )
    activation_bytes: float = 0.0  # of one message

    @classmethod
    def from_profile(cls, path: str | Path) -> Costs:
        """Costs that a run has measured (`profile.json`).

        Raises:
            ValueError: when the file holds something else.
        """
        try:
            profile = json.loads(Path(path).read_text())
            return cls(
                **{
                    name: profile["costs"][name]
                    for name in cls.__dataclass_fields__
                    if name in profile["costs"]
                }
            )
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a profile written by scripts/train.py --profile: {error}"
            ) from error

    def of(self, name: str, segment: int, last: bool = False) -> float:
        value = getattr(self, name)
        if isinstance(value, int | float):
            return 0.0 if name == "head" and last else float(value)
        return float(value[segment])


@dataclass
class Timeline:
    """The result of a simulation. Times are in the unit of the costs."""

    schedule: Schedule
    makespan: float  # of one step alone, from empty to empty
    steady_period: float  # of a step in a long run; no stage waits for another between steps unless the routes demand it
    busy: list[float]  # per stage, in one step
    events: list[Event] = field(repr=False)  # of the step alone
    activation_bytes: float = 0.0

    @property
    def idle_share_of_stage(self) -> list[float]:
        """In the steady state."""
        return [max(0.0, 1 - busy / self.steady_period) for busy in self.busy]

    @property
    def idle_share(self) -> float:
        """Mean over the stages, in the steady state."""
        return sum(self.idle_share_of_stage) / len(self.busy)

    @property
    def idle_share_alone(self) -> float:
        """Of one step alone: the bubble that a flush after every step would leave."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy))

    def report(self) -> dict[str, Any]:
        messages = self.schedule.message_counts()
        return {
            "schedule": self.schedule.name,
            "stages": self.schedule.num_stages,
            "micro_batches": self.schedule.num_micro_batches,
            "makespan": self.makespan,
            "steady_period": self.steady_period,
            "idle_share": self.idle_share,
            "idle_share_of_stage": self.idle_share_of_stage,
            "idle_share_alone": self.idle_share_alone,
            "peak_live_micro_batches": list(self.schedule.peak_live),
            "messages": messages,
            "bytes": sum(messages.values()) * self.activation_bytes,
        }


def simulate(
    schedules: Schedule | Sequence[Schedule], costs: Costs, link_depth: int | None = None
) -> Timeline:
    """Replay a step with `costs`, once alone and then for several steps until the period settles.

    Args:
        schedules: of a step, or of successive steps that differ (shifted chunks) and start over
            after the last.

    Raises:
        ValueError: when the schedule deadlocks at this link depth, or all costs are 0.
    """
    schedules = [schedules] if isinstance(schedules, Schedule) else schedules
    first = schedules[0]
    per_action = {id(schedule): _action_costs(schedule, costs) for schedule in schedules}

    def cost(schedule: Schedule, action: Action) -> float:
        return per_action[id(schedule)][action]

    def link_time(link: Link) -> float:
        return costs.of("link", link.lower)

    alone, stuck = replay(first, cost, link_time, link_depth)
    if stuck is not None:
        raise ValueError(f"{first.name}: {stuck}; links hold {link_depth} messages")
    makespan = max(e.end for e in alone)
    if makespan <= 0:
        raise ValueError("all costs are 0; give at least --forward a time")
    busy = [
        sum(cost(schedule, action) for schedule in schedules for action in schedule.stages[stage])
        / len(schedules)
        for stage in range(first.num_stages)
    ]
    return Timeline(
        first,
        makespan,
        _steady_period(schedules, cost, link_time, link_depth),
        busy,
        alone,
        costs.activation_bytes,
    )


def _action_costs(schedule: Schedule, costs: Costs) -> dict[Action, float]:
    """Time of every action; a stage's last one also pays for its optimizer step."""
    parts = {
        FORWARD: ("forward",),
        BACKWARD: ("input_grad", "weight_grad"),
        INPUT_GRADIENT: ("input_grad",),
        WEIGHT_GRADIENT: ("weight_grad",),
    }
    times = {
        a: sum(costs.of(part, a.segment) for part in parts[a.kind]) for a in schedule.actions()
    }
    last = len(schedule.stage_of) - 1
    for action in _first_reader_of_own_loss(schedule):
        times[action] += costs.of("head", action.segment, action.segment == last)
    for stage, actions in enumerate(schedule.stages):
        times[actions[-1]] += sum(
            costs.of("optimizer", s) for s, p in enumerate(schedule.stage_of) if p == stage
        )
    return times


def _first_reader_of_own_loss(schedule: Schedule) -> set[Action]:
    """The actions that also run their segment's head: its loss is computed where its gradient is
    first needed."""
    readers: dict[tuple[int, int], Action] = {}
    for action in schedule.actions():
        if action.kind in (BACKWARD, INPUT_GRADIENT) and any(
            loss == action.segment for loss, _ in schedule.route(action).reads
        ):
            readers.setdefault((action.segment, action.micro_batch), action)
    return set(readers.values())


def _steady_period(
    schedules: Sequence[Schedule], cost: Any, link_time: Any, link_depth: int | None
) -> float:
    """How much later a step ends than the one before it (a mean over `schedules`), once the run has
    settled."""
    cycle = len(schedules)
    rounds = least = _least_rounds(schedules[0])
    while True:
        events, _ = replay(schedules, cost, link_time, link_depth, rounds * cycle)
        ends = [0.0] * rounds
        for event in events:
            ends[event.step // cycle] = max(ends[event.step // cycle], event.end)
        before, settled = ends[-2] - ends[-3], ends[-1] - ends[-2]
        if abs(settled - before) < 1e-9 * max(settled, 1e-300) or rounds >= least + MAX_ROUNDS:
            return settled / cycle
        rounds += 4


def _least_rounds(schedule: Schedule) -> int:
    """Steps before a run may have settled. Chunks fall behind each other one by one, at an even
    pace while it lasts."""
    cut = [
        schedule.stage_of[link.lower]
        for link in map(schedule.sends, schedule.actions())
        if link and link.kind == "gradient"
    ]
    chunks = 0 < len(set(cut)) < schedule.num_stages - 1
    return max(4, schedule.num_stages) if chunks else 4


class StepTimer:
    """`Timeline.steady_period` of one schedule under many costs, without limit on link depth:
    quick, for sweeps.

    Steps depend on each other only by the clocks of stages and links, so the order of one replayed
    step serves all.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        events, stuck = replay(schedule)
        if stuck is not None:
            raise ValueError(f"{schedule.name}: {stuck}")
        number = {event.action: i for i, event in enumerate(events)}
        links: dict[Link, int] = {}
        self._links: list[Link] = []
        self._actions = [event.action for event in events]
        self._work = []
        for event in events:
            needs = schedule.requires(event.action)
            link = schedule.sends(event.action)
            if link is not None and not schedule.crosses_stages(link):
                link = None
            if link is not None and link not in links:
                links[link] = len(links)
                self._links.append(link)
            from_link = [number[a] for a, via in needs if via is not None]
            own = [number[a] for a, via in needs if via is None]
            self._work.append(
                (event.stage, tuple(own), tuple(from_link), -1 if link is None else links[link])
            )

    def steady_period(self, costs: Costs) -> float:
        per_action = _action_costs(self._schedule, costs)
        seconds = [per_action[action] for action in self._actions]
        link_seconds = [costs.of("link", link.lower) for link in self._links]
        clock, free = [0.0] * self._schedule.num_stages, [0.0] * len(self._links)
        done, there = [0.0] * len(seconds), [0.0] * len(seconds)
        ends: list[float] = []
        least = _least_rounds(self._schedule)
        while len(ends) < least + 3 * MAX_ROUNDS:
            for i, (stage, own, from_link, link) in enumerate(self._work):
                start = clock[stage]
                for other in own:
                    start = max(start, done[other])
                for other in from_link:
                    start = max(start, there[other])
                end = clock[stage] = done[i] = there[i] = start + seconds[i]
                if link >= 0:
                    there[i] = free[link] = max(end, free[link]) + link_seconds[link]
            ends.append(max(clock))
            if len(ends) >= least and abs(ends[-1] - 2 * ends[-2] + ends[-3]) < 1e-6 * (
                ends[-1] - ends[-2]
            ):
                break
        return ends[-1] - ends[-2]


def most_without_idling(
    first: Routes,
    second: Routes,
    num_micro_batches: int,
    transfer: float = 0.0,
    split_backward: int = 0,
) -> int:
    """How many micro-batches of a step may follow the row `first` before the pipeline is slower
    than if all followed `second`.

    One segment a stage, forward and both parts of the backward one unit each, heads free; so it
    depends on the model's segments alone. 0 when even one is too many.

    Args:
        transfer: time of a message, in forwards.
        split_backward: see `order.make_schedule`.
    """

    def period(count: int) -> float:
        mix = [(first, count), (second, num_micro_batches - count)]
        schedule = make_schedule(mix, first.num_segments, transfer, split_backward)
        return StepTimer(schedule).steady_period(Costs(link=transfer))

    limit = period(0) * (1 + 1e-9)
    return bisect_right(range(1, num_micro_batches), limit, key=period)


def chrome_trace(timeline: Timeline, microseconds_per_unit: float = 1e6) -> dict[str, Any]:
    """The step alone as a Chrome/Perfetto trace, one lane per stage."""
    return {
        "traceEvents": [
            {
                "name": str(e.action),
                "cat": e.action.kind,
                "ph": "X",
                "pid": 0,
                "tid": e.stage,
                "ts": e.start * microseconds_per_unit,
                "dur": (e.end - e.start) * microseconds_per_unit,
                "args": {"segment": e.action.segment, "micro_batch": e.action.micro_batch},
            }
            for e in timeline.events
        ]
        + [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": s, "args": {"name": f"stage {s}"}}
            for s in range(timeline.schedule.num_stages)
        ]
    }


COLORS = {
    FORWARD: "#4c78a8",
    BACKWARD: "#f2a541",
    INPUT_GRADIENT: "#e45756",
    WEIGHT_GRADIENT: "#72b7b2",
}
NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRADIENT: "input gradient only",
    WEIGHT_GRADIENT: "weight gradient",
}


def draw(timelines: Sequence[Timeline], path: str | Path) -> None:
    """Draw time lines under each other on one time axis, one row per stage; idle time stays
    white."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = [t.schedule.num_stages for t in timelines]
    figure, axes = plt.subplots(
        len(timelines),
        1,
        sharex=True,
        squeeze=False,
        figsize=(12, 0.6 + 0.36 * sum(rows) + 0.7 * len(rows)),
        height_ratios=rows,
        layout="constrained",
    )
    few = max(t.schedule.num_micro_batches for t in timelines) <= 16 and max(rows) <= 16
    kinds = set()
    for axis, timeline in zip(axes[:, 0], timelines, strict=True):
        for event in timeline.events:
            backprop = (
                event.action.kind != FORWARD
                and timeline.schedule.rows[event.action.micro_batch].mode == "backprop"
            )
            kinds.add(event.action.kind)
            axis.broken_barh(
                [(event.start, event.end - event.start)],
                (event.stage - 0.42, 0.84),
                facecolors=COLORS[event.action.kind],
                edgecolor="white",
                linewidth=0.6,
                hatch="//" if backprop and "x" in timeline.schedule.name else None,
            )
            if few:
                axis.text(
                    (event.start + event.end) / 2,
                    event.stage,
                    event.action.micro_batch,
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white",
                )
        axis.set_yticks(
            range(timeline.schedule.num_stages),
            [f"stage {s}" for s in range(timeline.schedule.num_stages)],
        )
        axis.invert_yaxis()
        axis.set_title(
            f"{timeline.schedule.name}: {timeline.makespan:g} alone, {timeline.steady_period:g} a step in a long run, "
            f"idle {timeline.idle_share:.0%}",
            loc="left",
            fontsize=9,
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time")
    figure.legend(
        handles=[Patch(color=COLORS[k], label=NAMES[k]) for k in COLORS if k in kinds],
        loc="outside lower right",
        ncols=4,
        fontsize=8,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
