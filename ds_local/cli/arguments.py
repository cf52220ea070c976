"""Command-line arguments that several commands share."""

from __future__ import annotations


def number_or_auto(text: str) -> int | str:
    """A command line's count of micro-batches."""
    return text if text == "auto" else int(text)
