"""Command-line arguments that several commands share."""

from __future__ import annotations

from argparse import ArgumentTypeError

from ds_local.config.changes import CHANGES


def number_or_auto(text: str) -> int | str:
    """A command line's count of micro-batches."""
    return text if text == "auto" else int(text)


def kinds_of_change(text: str) -> list[str]:
    """A command line's list of `CHANGES`."""
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in CHANGES]
    if unknown:
        raise ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CHANGES)}")
    return kinds
