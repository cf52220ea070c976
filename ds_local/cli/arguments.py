"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ds_local.config.changes import CHANGES
from ds_local.errors import OutputError
from ds_local.outputs import check_file


def number_or_auto(text: str) -> int | str:
    """A command line's count of micro-batches."""
    return text if text == "auto" else int(text)


def output_file(mark: str) -> Callable[[str], Path]:
    """The type of an argument that names a file to write, "-" for the console: one that is there
    must be of the same command, whose files have `mark` at their beginning."""

    def checked(text: str) -> Path:
        try:
            return Path(text) if text == "-" else check_file(text, mark)
        except OutputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


PICTURE, TRACE = output_file("Matplotlib"), output_file('"traceEvents"')


def kinds_of_change(text: str) -> list[str]:
    """A command line's list of `CHANGES`."""
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in CHANGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CHANGES)}")
    return kinds
