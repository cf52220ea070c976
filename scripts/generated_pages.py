"""Write the pages of the reference that are made from the code, docs/schemes.md,
docs/api.md, docs/options.md and docs/metrics.md, the site's first page from README, and what the
planner knows of the study.

python scripts/generated_pages.py
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import api_pages
import options_page

from ds_local.checkpoints.run_fields import METRICS, RUN, SPLITS
from ds_local.cluster import learning
from ds_local.cluster.scheme_samples import delay_of
from ds_local.config import strict_json
from ds_local.config.catalog import BACKPROP, SCHEMES, Section, section_of
from ds_local.outputs import write_file
from ds_local.study.methods import METHODS
from ds_local.study.recipes import PRESETS
from ds_local.study.results import time_for_the_loss

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.parent / "README.md"
WRITTEN = "<!-- written by `python scripts/generated_pages.py`; change what it reads -->"
SCHEMES_HEAD = f"""# Schemes by name

{WRITTEN}

One name each, in charts, tables and the study's commands: the mode, its window, its options.
`simulate` writes a mode with its window in brackets, `chunked(2)`, and other pipelines as `1f1b` or
`zero_bubble(h1)`. The section goes into ds_config.json as "local_parallel"; what it does is in
[concepts](concepts.md). Names that are longer, as in the [study](quality.md), begin with one of
these and say what is added: a tail in backpropagation, the heads, the steps. A share of a mix is
written out for 8 micro-batches a step. Deep supervision "dropped by half" loses its auxiliary
losses one by one, the lowest first, in the first half of the steps: its phases depend on how many
there are, `ds_local.dropped_losses` makes them.

| name | section | what it does |
|---|---|---|
"""


API_HEAD = f"""# API

{WRITTEN}

The public names of `ds_local`, imported on first use. A script of a few lines is in
[the front page](index.md) and in `examples/`; what may travel between layers of your own is in
[ports](ports.md#layers-of-ones-own).

"""
OPTIONS_HEAD = f"""# Options

{WRITTEN}

Of every command, as `--help` says them; what the commands are for is in [commands](commands.md).

"""
METRICS_HEAD = f"""# Figures of a run

{WRITTEN}

## metrics.jsonl

One object a line, strict JSON. A number that is not finite is null, and `nonfinite` says so.

| `split` | a row for each segment and |
|---|---|
"""
FIELDS_HEAD = """
| field | in rows of | unit | meaning |
|---|---|---|---|
"""
RUN_HEAD = """
## run.json

What the newest start was; `starts` has every one.

| key | meaning |
|---|---|
"""


def metrics() -> str:
    splits = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in SPLITS.items())
    fields = "".join(
        f"| `{name}` | {'all' if len(of.splits) == len(SPLITS) else ', '.join(of.splits)} "
        f"| {of.unit} | {of.meaning} |\n"
        for name, of in METRICS.items()
    )
    keys = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in RUN.items())
    return METRICS_HEAD + splits + FIELDS_HEAD + fields + RUN_HEAD + keys


def index() -> str:
    """README as a page of the site: its links begin in docs/, others lead nowhere there."""
    text = README.read_text().replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)?[A-Z]+\.md\)", r"\1", text)


def section_text(section: Section) -> str:
    return json.dumps(section_of(section, 8))


def schemes() -> str:
    lines = (
        f"| {name} | `{section_text(scheme.section)}` | {scheme.sentence} |"
        for name, scheme in SCHEMES.items()
    )
    return SCHEMES_HEAD + "\n".join(lines) + "\n"


def measured_learning() -> str:
    """Rows of the study of their preset's own length, where depth pays."""
    names = {id(scheme.section): name for name, scheme in SCHEMES.items()}
    rows = []
    for row in json.loads((DOCS / "quality.json").read_text()):
        method = METHODS[row["method"]]
        otherwise = method.renew or method.dropped_by or (method.tail and method.end != BACKPROP)
        if row["step_factor"] != 1.0 or not row["depth_pays"] or otherwise:
            continue
        # one that ended below backpropagation needs as many at the most
        as_good = 1.0 if row["gap_nats"] <= 0 else None
        measured = learning.Measured(
            names[id(method.scheme)],
            dict(method.head),
            row["segments"],
            _ratio(row["preset"]),
            row["seeds"],
            row["tokens_to_equal_loss"] or as_good,
            tail=method.tail,
        )
        rows.append(measured)
    rows += measured_ahead()
    optional = learning.Measured._field_defaults
    said = (
        {key: value for key, value in row._asdict().items() if value != optional.get(key, ())}
        for row in rows
    )
    return "[\n " + ",\n ".join(map(strict_json.dumps, said)) + "\n]\n"


def measured_ahead() -> list[learning.Measured]:
    """Of forwards that run ahead: with how many steps a run ends where backpropagation does,
    between whole runs of several lengths, the mean over the seeds."""
    found: dict[tuple[str, int, int], dict[int, dict[float, float]]] = {}
    exact = {}
    for run in json.loads((DOCS / "results" / "run-ahead.json").read_text()):
        method, preset = METHODS[run["method"]], PRESETS[run["preset"]]
        if run["preset"] != "cpu" or method.tail:
            continue
        if method.scheme == SCHEMES["backprop"].section and run["step_factor"] == 1.0:
            exact[run["seed"]] = run["loss"]
        name = next(name for name, one in SCHEMES.items() if one.section == method.scheme)
        key = name, run["segments"], method.micro_batches or preset.micro_batches
        found.setdefault(key, {}).setdefault(run["seed"], {})[run["step_factor"]] = run["loss"]
    rows = []
    for (name, segments, micro_batches), seeds in found.items():
        tokens = [time_for_the_loss(exact[seed], whole) for seed, whole in seeds.items()]
        known = [one for one in tokens if one is not None]
        if "run ahead" in name and known:
            ratio, delay = _ratio("cpu"), delay_of(name, segments, micro_batches)
            needed = round(mean(known), 4)
            rows.append(
                learning.Measured(name, {}, segments, ratio, len(known), needed, round(delay, 4))
            )
    return rows


def _ratio(preset: str) -> float:
    model = PRESETS[preset].model
    return float(model["vocab_size"] / model["n_embd"])


def pages() -> Iterator[tuple[Path, str]]:
    """(path, text) of every page."""
    yield DOCS / "index.md", index()
    yield DOCS / "schemes.md", schemes()
    yield DOCS / "api.md", API_HEAD + api_pages.api()
    yield DOCS / "metrics.md", metrics()
    yield DOCS / "options.md", OPTIONS_HEAD + options_page.options()
    yield learning.DATA, measured_learning()


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path, text in pages():
        write_file(path, text)


if __name__ == "__main__":
    main()
