"""What a run folder says of its run: curves by segment and stage, phases, the schedule of a step.

All that is missing or damaged, as in the folder of an older run, is left out.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_local.charts.timelines import Band, Piece
from ds_local.checkpoints.metrics_file import METRICS_FILE, MetricsFile, not_finite, of_full_model
from ds_local.checkpoints.run_file import run_facts
from ds_local.config.deepspeed import batch_sizes
from ds_local.config.files import local_parallel
from ds_local.errors import DsLocalError, RunError
from ds_local.schedules.drawing import band_of
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.simulator import Costs, several_steps, simulate

Points = list[tuple[float, float | None]]
Row = dict[str, Any]
# instruction of a trace -> kind of an action
_KIND_OF = {
    "LoadMicroBatch": "F",
    "ForwardPass": "F",
    "GradientPass": "B",
    "WeightGradient": "W",
    "ReduceGrads": "U",
    "OptimizerStep": "U",
}


class RunRecord:
    """A run folder, read.

    Args:
        path: of the folder.

    Raises:
        RunError: when it holds no metrics.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows = MetricsFile(self.path / METRICS_FILE).read()
        if not self.rows:
            raise RunError(f"{self.path} holds no metrics.jsonl with rows; is it a run folder?")
        self.name = self.path.resolve().name
        self.facts = run_facts(self.path)
        self.train = [row for row in self.rows if row["split"] == "train"]
        self.validation = [row for row in self.rows if row["split"] == "validation"]
        self.samples = [row for row in self.rows if row["split"] == "sample"]
        self.events = not_finite(self.rows)

    # --- curves --------------------------------------------------------------------------------

    @cached_property
    def segments(self) -> list[int]:
        return sorted({row["segment"] for row in self.rows})

    @cached_property
    def stages(self) -> list[int]:
        return sorted({row["stage"] for row in self.train})

    @cached_property
    def stages_now(self) -> list[int]:
        """Those of the newest reports: a resumed run may have others than it had."""
        newest = max((row["step"] for row in self.train), default=0)
        return sorted({row["stage"] for row in self.train if row["step"] == newest})

    @property
    def last_step(self) -> int:
        return max(row["step"] for row in self.rows)

    @property
    def tokens(self) -> int:
        return max(row["tokens"] for row in self.rows)

    def points(
        self, split: str, segment: int, name: str, x: str = "step", per: str = "segment"
    ) -> Points:
        """A figure of one segment, or (`per` "stage") of a stage's first one, over `x`."""
        found = {row[x]: row.get(name) for row in self._rows_of[split, per, segment]}
        return sorted(found.items(), key=lambda point: point[0])

    @cached_property
    def _rows_of(self) -> defaultdict[tuple[str, str, int], list[Row]]:
        """Rows by split and segment, and those of a stage's first segment by split and stage."""
        found: defaultdict[tuple[str, str, int], list[Row]] = defaultdict(list)
        firsts: dict[int, int] = {}
        for row in self.train + self.validation:
            segment, stage = row["segment"], row["stage"]
            firsts[stage] = min(firsts.get(stage, segment), segment)
            found[row["split"], "segment", segment].append(row)
        for stage, segment in firsts.items():
            for split in ("train", "validation"):
                found[split, "stage", stage] = found[split, "segment", segment]
        return found

    @cached_property
    def pace(self) -> Points:
        """(step, tokens per second of the slowest stage in that step)."""
        slowest: defaultdict[int, float] = defaultdict(float)
        for row in self.train:
            slowest[row["step"]] = max(slowest[row["step"]], row.get("step_seconds") or 0.0)
        per_step = {row["step"]: row["tokens"] / row["step"] for row in self.train if row["step"]}
        found = {step: per_step[step] / slowest[step] for step in per_step if slowest[step]}
        return sorted(found.items())

    def mean(self, name: str, stage: int) -> float | None:
        """Of a stage's steps, weighted by what they took; the first report pays for the start."""
        rows = self._rows_of["train", "stage", stage]
        rows = rows[1:] or rows
        seconds = sum(row.get("step_seconds") or 0.0 for row in rows)
        total = sum((row.get(name) or 0.0) * (row.get("step_seconds") or 0.0) for row in rows)
        return total / seconds if seconds else None

    def waits(self, stage: int) -> dict[str, float]:
        """Link -> share of the stage's reports in which it waited for that link longest, the
        longest first."""
        rows = self._rows_of["train", "stage", stage]
        counts = Counter(row["slowest_link"] for row in rows if row.get("slowest_link"))
        return {link: count / counts.total() for link, count in counts.most_common()}

    def waiting(self, stage: int, most: int = 120) -> list[tuple[int, int, float, str | None]]:
        """(first step, last step, mean idle share, link waited for longest) of at most so many
        stretches of the run."""
        rows = self._rows_of["train", "stage", stage]
        found = []
        for start in range(0, len(rows), size := -(-len(rows) // most) or 1):
            part = rows[start : start + size]
            by_link: defaultdict[str | None, float] = defaultdict(float)
            for row in part:
                by_link[row.get("slowest_link")] += row.get("idle_share") or 0.0
            link = max(by_link, key=lambda link: by_link[link])
            share = sum(by_link.values()) / len(part)
            found.append((part[0]["step"], part[-1]["step"], share, link))
        return found

    @cached_property
    def memory(self) -> dict[int, int]:
        """Stage -> most bytes that one of its ranks has held, where it was measured."""
        found: dict[int, int] = {}
        for row in self.validation:
            if row.get("memory_bytes"):
                found[row["stage"]] = max(found.get(row["stage"], 0), row["memory_bytes"])
        return found

    @property
    def final_loss(self) -> float | None:
        """Of the full model, at the last validation."""
        losses = [row["loss"] for row in of_full_model(self.validation)]
        return losses[-1] if losses else None

    # --- what was to happen --------------------------------------------------------------------

    @cached_property
    def plan(self) -> RunPlan | None:
        """None where run.json does not say enough, or is of a start with fewer stages that has
        reported nothing yet."""
        try:
            section, layout = local_parallel(self.facts["config"]), self.facts["layout"]
            if max(self.stages_now, default=0) >= layout["stages"]:
                return None
            _, count = batch_sizes(self.facts["config"], layout["replicas"])
            return RunPlan.of(section, layout["stages"], count)
        except (DsLocalError, KeyError, TypeError):
            return None

    @cached_property
    def phases(self) -> list[tuple[int, int, str]]:
        """(first step, step after the last, name) of every stretch with a scheme of its own."""
        if self.plan is None:
            return []
        starts = [start for start, _ in self.plan.section.schemes()]
        starts = [start for start in starts if start < self.last_step]
        ends = [*starts[1:], self.last_step]
        return [
            (start, end, self.plan.schedule_at(start).name)
            for start, end in zip(starts, ends, strict=True)
        ]

    @cached_property
    def costs(self) -> Costs | None:
        """As measured, where the run was profiled."""
        path = self.path / "profile.json"
        try:
            return Costs.from_profile(path) if path.exists() else None
        except DsLocalError:
            return None

    @cached_property
    def expected_idle(self) -> list[float] | None:
        """Of each stage, by the schedule of the run's longest stretch."""
        if self.plan is None or not self.phases:
            return None
        start = max(self.phases, key=lambda phase: phase[1] - phase[0])[0]
        schedule = self.plan.schedule_at(start)
        return simulate(schedule, self.costs or Costs()).idle_share_of_stage

    def step_picture(self) -> tuple[Band, str, str] | None:
        """(lanes of one step, unit of its time, how they came about)."""
        recorded = _recorded(_json(self.path / "trace.json"))
        if recorded is not None:
            return (
                recorded,
                "seconds",
                "as executed, from trace.json; point at a piece for its time",
            )
        if self.plan is None or self.plan.num_stages * self.plan.num_micro_batches > _MOST:
            return None
        schedule = self.plan.schedule_at(max(self.last_step - 1, 0))
        timeline = simulate(schedule, self.costs or Costs())
        times, unit = "each part takes a unit", "units"
        if self.costs:
            times, unit = "times of profile.json", "seconds"
        band = band_of(timeline, several_steps(schedule, self.costs or Costs(), 1))
        return band, unit, f"simulated: {times}; train.py --profile records it as executed"


_MOST = 2048  # forwards of a step in a picture


def _recorded(trace: Any) -> Band | None:
    """The last whole step of a trace as lanes, replica 0."""
    try:
        events = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 0]
        steps = sorted({e["args"]["step"] for e in events})
        if len(steps) < 2:
            return None
        # the first may be incomplete
        chosen = [e for e in events if e["args"]["step"] == steps[-1]]
        begin = min(e["ts"] for e in chosen)
        pieces = [_piece(e, begin) for e in chosen if e["name"] in _KIND_OF]
        end = max(piece.end for piece in pieces)
    except (KeyError, TypeError, ValueError):
        return None
    num_stages = 1 + max(piece.stage for piece in pieces)
    note = f"{end:.4g} s from the first instruction to the last"
    return Band(f"step {steps[-1] + 1}", note, num_stages, pieces)


def _piece(event: Row, begin: float) -> Piece:
    start = (event["ts"] - begin) / 1e6
    long = event["dur"] / 1e6
    tip = f"{event['name']}: {long * 1e3:.4g} ms"
    return Piece(event["tid"], 0, _KIND_OF[event["name"]], start, start + long, "", tip)


def thinned(points: Points, most: int = 240) -> Points:
    """At most four points for each of `most` stretches: first, least, largest, last, so that no
    peak is lost."""
    if len(points) <= 4 * most:
        return points
    size = -(-len(points) // most)
    kept: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        there = sorted((y, x) for x, y in part if y is not None)
        peaks = {(x, y) for y, x in (there[0], there[-1])} if there else set()
        kept += sorted({part[0], part[-1], *peaks}, key=lambda p: p[0])
    return kept


def _json(path: Path) -> Any:
    """What a file holds; {} when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
