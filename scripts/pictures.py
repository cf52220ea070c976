"""The pictures of README and docs, from the simulator and the kept figures.

python scripts/pictures.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from choosing import ROWS

from ds_local.charts.dots import Dot, DotPanel, draw_dots
from ds_local.charts.maps import Panel, draw_map
from ds_local.charts.plots import Curve, chart
from ds_local.charts.style import SERIES, colors_of
from ds_local.charts.svg import Svg
from ds_local.charts.timelines import draw_bands
from ds_local.config.catalog import SCHEMES, section_of
from ds_local.config.files import local_parallel
from ds_local.config.strict import SECTION
from ds_local.measure.stage_alone_page import picture
from ds_local.schedules.drawing import band_of, draw_routes
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.schedule import Event, Schedule
from ds_local.schedules.simulator import Costs, Timeline, several_steps, simulate
from ds_local.study.picture import AT_THE_RATIO, curves_chart, gaps_chart

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
TABLES = ROOT / "docs" / "results" / "benchmarks.md"
RELIABILITY = ROOT / "docs" / "results" / "reliability.json"  # by tests/faults/run.py
RUN_AHEAD = ROOT / "docs" / "results" / "run-ahead.json"  # by scripts/study.py
STAGE_ALONE = ROOT / "docs" / "results" / "stage-alone.json"  # by scripts/stage_alone.py
GPU = ROOT / "docs" / "results" / "gpu.json"  # by benchmark.py gpu
CHOOSING = ROOT / "docs" / "results" / "choosing.json"  # by scripts/choosing.py
# file of a scheme on the page of concepts -> its name in the table of schemes
CONCEPTS = {
    "backprop": "backprop",
    "backprop-split": "backprop, split 2",
    "run-ahead": "backprop, run ahead",
    "local": "local",
    "chunked": "chunked 2",
    "chunked-split": "chunked 2, split 2",
    "chunked-ahead": "chunked 2, run ahead",
    "shifted-chunked": "shifted chunks 2",
    "overlapping": "overlapping 2",
    "interlocking": "interlocking 2",
    "deep-supervision": "deep supervision",
    "mix": "mixed 1/4",
    "corrected": "chunked 2, half corrected",
}


def schedules_of(scheme: str) -> list[Schedule]:
    """On four stages, with four micro-batches."""
    section = section_of(SCHEMES[scheme].section, 4)
    return RunPlan(local_parallel({SECTION: section}), 4, 4).schedules


def run_of(scheme: str, steps: int) -> tuple[Timeline, list[Event]]:
    schedules = schedules_of(scheme)
    return simulate(schedules, Costs()), several_steps(schedules, Costs(), steps)


def first_picture() -> str:
    """1F1B above what we recommend for few micro-batches, two steps each."""
    usual, ours = run_of("backprop", 2), run_of("chunked 2, split 2", 2)
    bands = [
        band_of(*usual, "backprop: 1F1B, DeepSpeed's pipeline"),
        band_of(*ours, "chunked 2, split 2: ds_local, pairs of stages"),
    ]
    label = "Two steps of four stages under 1F1B and under chunks of two with a split backward"
    return draw_bands(bands, label).file()


def concept(scheme: str) -> str:
    """A scheme's route table beside two steps of its schedule."""
    timeline, events = run_of(scheme, 2)
    label = f"two steps of {scheme}"
    if "mix" in SCHEMES[scheme].section:
        rows = timeline.schedule.rows
        few = sum(row == rows[0] for row in rows)
        first = "micro-batch 0" if few == 1 else f"micro-batches 0 to {few - 1}"
        tables = [(first, rows[0]), ("the others", rows[-1])]
    else:
        steps = schedules_of(scheme)
        tables = [(f"step {n}" if len(steps) > 1 else "", s.rows[0]) for n, s in enumerate(steps)]
    matrix = draw_routes(tables)
    band = band_of(timeline, events, scheme)
    lanes = draw_bands([band], label, 860 - matrix.width, 22)
    both = Svg(860, 0, f"{matrix.label}; {label}")
    both.embed(matrix, 0, 12)
    both.embed(lanes, matrix.width, 0)
    return both.file()


def shown(times: list[list[dict[str, float]]]) -> list[list[dict[str, float]]]:
    """The cells of a map under the names that people read."""
    names = {key: row.name for key, row in ROWS.items()}
    return [[{names[key]: value for key, value in cell.items()} for cell in row] for row in times]


def choosing() -> str:
    """The map of the page "choosing", from docs/results/choosing.json."""
    facts = json.loads(CHOOSING.read_text())
    panels = [Panel(name, shown(model["times"])) for name, model in facts["models"].items()]
    rows = [f"{count / facts['stages']:g}" for count in facts["micro_batches"]]
    columns = [f"{ratio:g}".removeprefix("0") or "0" for ratio in facts["message_over_forward"]]
    return draw_map(
        "Few micro-batches or slow links: local losses. Otherwise: backpropagation, split",
        panels,
        ("micro-batches per stage", rows),
        ("time of a message, in forwards of a stage", columns),
        "time to equal loss, in parts of what 1F1B needs on the same links",
    ).file()


def measured(head: str) -> tuple[list[str], dict[str, list[tuple[float, float, float]]]]:
    """(column names, row -> (median, lowest, highest) of each column) of a benchmark's
    table; a row that a column lacks is shorter."""
    lines = TABLES.read_text().splitlines()
    start = lines.index(head)
    columns = [cell.strip() for cell in head.strip("|").split("|")][1:]
    rows = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found = [re.match(r"([\d.]+)(?: \(([\d.]+)-([\d.]+)\))?", cell) for cell in cells]
        values = [(one[1], one[2] or one[1], one[3] or one[1]) for one in found if one]
        if len(values) == len(cells):
            rows[name] = [(float(a), float(b), float(c)) for a, b, c in values]
    return columns, rows


def busy(
    title: str, head: str, x_name: str, shown: dict[str, str], scale: Callable[[float], float]
) -> str:
    """Measured busy shares of some systems as curves, from the columns "... = X" of a table, which
    lie at `scale(X)`.

    Args:
        shown: row of the table -> name in the picture.
    """
    columns, rows = measured(head)
    texts = [column.partition("= ")[2] for column in columns if "=" in column]
    labels = [(scale(float(text)), text) for text in texts]
    curves, repeated = [], False
    colors = colors_of(list(shown.values()))
    for row, name in shown.items():
        values = rows[row][: len(labels)]
        points = [(x, value[0]) for (x, _), value in zip(labels, values, strict=True)]
        spread = [value[1:] for value in values]
        repeated = repeated or any(low < high for low, high in spread)
        curves.append(Curve(name, colors[name], points, True, spread))
    y_name = "busy share of the stages in %"
    y_name += "; vertical lines: lowest to highest repetition" if repeated else ""
    size = (860.0, 300.0)
    return chart(title, curves, x_name, y_name, size=size, y_range=(0, 102), x_ticks=labels).file()


def busy_by_micro_batches() -> str:
    shown = {
        "ds_local local": "local",
        "ds_local chunked 2, run ahead": "chunked 2, run ahead",
        "ds_local chunked 2, split 2": "chunked 2, split 2",
        "ds_local backprop, split 2": "backprop, split 2",
        "torch ZBVZeroBubble": "torch ZBV",
        "deepspeed 1F1B": "DeepSpeed 1F1B",
    }
    return busy(
        "With few micro-batches local losses and run-ahead keep the stages busy",
        "| P = 4 | M = 1 | M = 2 | M = 4 | M = 8 |",
        "micro-batches a step, 4 stages",
        shown,
        math.log2,
    )


def busy_by_links() -> str:
    shown = {
        "ds_local local": "local",
        "ds_local chunked 2, split 2": "chunked 2, split 2",
        "ds_local backprop, split 2": "backprop, split 2",
        "torch ZBVZeroBubble": "torch ZBV",
        "deepspeed 1F1B": "DeepSpeed 1F1B",
    }
    return busy(
        "On slow links what sends nothing down keeps its speed",
        "| P = 4, M = 8 | c/F = 0 | c/F = 1 | c/F = 3 | delay 100 ms |",
        "time of a message, in forwards of a stage",
        shown,
        float,
    )


def memory() -> str:
    """Live micro-batches and growth of the process on the fullest stage, from the table."""
    shown = {
        "ds_local local": "local",
        "ds_local chunked 2": "chunked 2",
        "ds_local interlocking 2": "interlocking 2",
        "ds_local overlapping 2": "overlapping 2",
        "ds_local mixed 1/4": "mixed 1/4",
        "ds_local backprop": "backprop",
        "deepspeed 1F1B": "DeepSpeed 1F1B",
        "torch ZBVZeroBubble": "torch ZBV",
        "torch GPipe": "torch GPipe",
    }
    lines = TABLES.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| P = 4, M = 16 |"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    most = {
        row[0]: [max(map(float, row[n].split(","))) for n in (1, 3)]
        for row in (next(row for row in cells if row[0] == name) for name in shown)
    }
    live, grown = ([[Dot(most[name][n])] for name in shown] for n in (0, 1))
    return draw_dots(
        "Local losses hold the least: live micro-batches of the fullest of four stages",
        list(shown.values()),
        [
            DotPanel("live micro-batches of 16", live, bars=True),
            DotPanel("growth of the process, MiB", grown, bars=True),
        ],
    ).file()


def reliability() -> str:
    """Cases of every campaign and its slowest answer; red where something was wrong."""
    everything = json.loads(RELIABILITY.read_text())["campaigns"]
    campaigns = {name: one for name, one in everything.items() if one["cases"]}
    cases = sum(one["cases"] for one in campaigns.values())
    wrong = sum(one["wrong"] for one in campaigns.values())
    panels = [
        DotPanel(name, [[Dot(one[key])] for one in campaigns.values()], bars=True)
        for name, key in (("cases", "cases"), ("slowest answer, s", "slowest_seconds"))
    ]
    colors = [SERIES[3] if one["wrong"] else SERIES[2] for one in campaigns.values()]
    title = f"{cases:,} runs broken on purpose, {wrong or 'none'} answered wrongly"
    return draw_dots(title, list(campaigns), panels, colors=colors).file()


LEAD, CHUNKS_LEAD = 3, 1  # of the first of four segments, in micro-batches
_DELAYED = {  # method -> (name, color)
    "backprop, run ahead": ("run ahead", SERIES[0]),
    "backprop, run ahead, predicted": ("predicted weights", SERIES[1]),
    "chunked 2, run ahead": ("chunks of two", SERIES[2]),
}


def run_ahead_quality() -> str:
    """Gap to backpropagation of the same seed, in nats, by the delay of the first segment's
    gradients in steps."""
    everything = json.loads(RUN_AHEAD.read_text())
    rows = [row for row in everything if (row["preset"], row["step_factor"]) == ("cpu", 1.0)]
    exact = {row["seed"]: row["loss"] for row in rows if row["method"] == "backprop"}
    found: dict[str, dict[float, list[float]]] = {name: {} for name in _DELAYED}
    for row in rows:
        scheme, _, more = row["method"].partition(" micro-batches")[0].rpartition(", ")
        name, count = (scheme, int(more)) if more.isdigit() else (row["method"], 4)
        if name in found:
            lead = CHUNKS_LEAD if name.startswith("chunked") else LEAD
            gap = row["loss"] - exact[row["seed"]]
            found[name].setdefault(lead / count, []).append(gap)
    curves = [
        Curve(
            _DELAYED[name][0],
            _DELAYED[name][1],
            [(delay, sum(gaps) / len(gaps)) for delay, gaps in sorted(points.items())],
            dots=True,
            spread=[(min(gaps), max(gaps)) for _, gaps in sorted(points.items())],
        )
        for name, points in found.items()
        if points
    ]
    return chart(
        "What older gradients cost: from a delay of one step on the loss is ruined",
        curves,
        "delay of the first segment's gradients, in steps",
        "gap to backpropagation, in nats",
    ).file()


def gpu() -> str:
    """Tokens a second of four devices, from the stages that one device was timed with."""
    names = ["local", "backprop, split 1", "backprop"]
    rows = [
        row
        for row in json.loads(GPU.read_text())
        if row["what"] == "prediction" and row["model"] == "gpt2-xl" and row["compiled"]
    ]
    links = list(dict.fromkeys(row["link"]["name"] for row in rows))
    found = {
        (row["link"]["name"], row["schedule"]): row["tokens_per_second"] / 1000
        for row in rows
        if row["schedule"] in names
    }
    most = max(map(round, found.values()))
    panels = [
        DotPanel(link, [[Dot(round(found[link, name]))] for name in names], bars=True, end=most)
        for link in links
    ]
    return draw_dots(
        "Local stages keep their speed down to 10 Gb/s: GPT-2 XL on four H200, thousand tokens/s, "
        "predicted",
        names,
        panels,
    ).file()


def study() -> Iterator[tuple[Path, str]]:
    """The charts of the quality study, as its verb `table` draws them too."""
    rows = json.loads((ROOT / "docs" / "quality.json").read_text())
    runs = (ROOT / "docs" / "quality-runs.jsonl").read_text().splitlines()
    yield FOLDER / "quality.svg", gaps_chart(rows)
    results = list(map(json.loads, runs))
    yield FOLDER / "quality-curves.svg", curves_chart(results, rows)
    yield FOLDER / "quality-ratio-curves.svg", curves_chart(results, rows, AT_THE_RATIO)


def pictures() -> Iterator[tuple[Path, str]]:
    """(path, text) of every picture."""
    yield from study()
    yield FOLDER / "choosing.svg", choosing()
    yield FOLDER / "busy.svg", busy_by_micro_batches()
    yield FOLDER / "links.svg", busy_by_links()
    yield FOLDER / "memory.svg", memory()
    yield FOLDER / "reliability.svg", reliability()
    yield FOLDER / "run-ahead-quality.svg", run_ahead_quality()
    yield FOLDER / "stage-alone.svg", picture(json.loads(STAGE_ALONE.read_text())[0])
    yield FOLDER / "gpu.svg", gpu()
    yield FOLDER / "first.svg", first_picture()
    for name, scheme in CONCEPTS.items():
        yield FOLDER / f"{name}.svg", concept(scheme)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for path, text in pictures():
        path.write_text(text)


if __name__ == "__main__":
    main()
