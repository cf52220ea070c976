"""The options of every command as Markdown, from the parsers themselves."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest.mock import patch

from ds_local.cli import VERBS


class _Found(Exception):
    """A parser, caught when it was about to parse."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def options() -> str:
    """A table for every command, and for each of a command's own."""
    lines: list[str] = []
    for verb, (module, what) in VERBS.items():
        parser = _parser_of(module)
        inner = _inner(parser)
        lines += [f"## {verb}", "", what[0].upper() + what[1:] + "." * (what[-1] != "?"), ""]
        if not inner:
            lines += [*_table(parser), ""]
        for name, one in inner.items():
            lines += [f"### {verb} {name}", "", *_table(one), ""]
    return "\n".join(lines).rstrip() + "\n"


def _parser_of(module: str) -> argparse.ArgumentParser:
    def caught(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Found(self)

    verb = importlib.import_module(f"ds_local.cli.{module}")
    with patch.object(argparse.ArgumentParser, "parse_args", caught):
        try:
            getattr(verb, "parse_arguments", verb.main)([])
        except _Found as found:
            return found.parser
    raise LookupError(f"{module} parses nothing")


def _inner(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _table(parser: argparse.ArgumentParser) -> Iterator[str]:
    actions = [one for one in parser._actions if not isinstance(one, argparse._HelpAction)]
    if not actions:
        yield "No options."
        return
    yield "| option | values | default | meaning |"
    yield "|---|---|---|---|"
    for action in actions:
        name = _name(action)
        default = "required" if action.required and action.option_strings else _default(action)
        yield f"| {name} | {_values(action)} | {default} | {_meaning(action)} |"


def _name(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return ", ".join(f"`{one}`" for one in action.option_strings)
    return f"`{max(action.option_strings, key=len, default=str(action.dest))}`"


def _values(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    many = " ..." if action.nargs in ("+", "*") else ""
    metavar = action.metavar or str(action.dest).upper()
    if action.choices is not None:
        shown = ", ".join(f"`{choice}`" for choice in action.choices)
        return (shown if len(list(action.choices)) <= 12 else f"`{metavar}`") + many
    return f"`{metavar}`{many}".replace("|", "\\|")


def _default(action: argparse.Action) -> str:
    nothing = action.default is None or action.default in (argparse.SUPPRESS, [])
    if nothing or action.nargs == 0:
        return ""
    if isinstance(action.default, list):
        whole = action.choices is not None and set(action.default) == set(action.choices)
        return "all" if whole else " ".join(f"`{one}`" for one in action.default)
    is_plain = isinstance(action.default, int | float | str)
    return f"`{json.dumps(action.default).strip(chr(34)) if is_plain else action.default}`"


def _meaning(action: argparse.Action) -> str:
    return " ".join((action.help or "").replace("%%", "%").replace("|", "\\|").split())
