"""Write the pages of the reference that are made from the code: docs/schemes.md.

python scripts/generated_pages.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from ds_local.config.catalog import SCHEMES, Section, section_of
from ds_local.outputs import write_file

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITTEN = "<!-- written by `python scripts/generated_pages.py`; change what it reads -->"
SCHEMES_HEAD = f"""# Schemes by name

{WRITTEN}

One name each, in every chart, table and command: the mode, its window, its options. The section
goes into ds_config.json as "local_parallel"; what it does is in [concepts](concepts.md). Names that
are longer, as in the [study](quality.md), begin with one of these and say what is added: a tail in
backpropagation, the heads, the steps. A share of a mix is written out for 8 micro-batches a step.

| name | section | what it does |
|---|---|---|
"""


def section_text(section: Section) -> str:
    return json.dumps(section_of(section, 8))


def schemes() -> str:
    lines = (
        f"| {name} | `{section_text(scheme.section)}` | {scheme.sentence} |"
        for name, scheme in SCHEMES.items()
    )
    return SCHEMES_HEAD + "\n".join(lines) + "\n"


def pages() -> Iterator[tuple[Path, str]]:
    """(path, text) of every page."""
    yield DOCS / "schemes.md", schemes()


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path, text in pages():
        write_file(path, text)


if __name__ == "__main__":
    main()
