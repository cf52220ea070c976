"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ds_local.charts.pages import PAGE_MARK
from ds_local.config.changes import CHANGES
from ds_local.errors import OutputError
from ds_local.outputs import check_file


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and of the ranks of a job only the first one says it."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # the launcher ends this rank when the first one has ended
        else:
            print(f"{self.prog}: {message}; see --help", file=sys.stderr, flush=True)
        sys.exit(2)


def whole(least: int = 0) -> Callable[[str], int]:
    """The type of an argument that is an integer of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text!r}"
            )
        return value

    return parse


def number(least: float = 0.0, above: bool = False) -> Callable[[str], float]:
    """The type of an argument that is a finite number of at least `least`, or above it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            bound = f"{'above' if above else 'of at least'} {least:g}"
            raise argparse.ArgumentTypeError(f"must be a number {bound}, got {text!r}")
        return value

    return parse


def number_or_auto(text: str) -> int | str:
    """A command line's count of micro-batches."""
    return text if text == "auto" else whole()(text)


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
PAGE = output_file(PAGE_MARK)
SHEET_MARK = "F0"
SHEET = output_file(SHEET_MARK)


def kinds_of_change(text: str) -> list[str]:
    """A command line's list of `CHANGES`."""
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in CHANGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CHANGES)}")
    return kinds
