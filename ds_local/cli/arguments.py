"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ds_local.charts.pages import PAGE_MARK
from ds_local.config.changes import CHANGES, RENAMED
from ds_local.config.files import nearest
from ds_local.errors import ConfigError, OutputError, first_line
from ds_local.outputs import check_file

_TEXTS = ("--prompt",)  # options whose values are no names


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there are some and the text does not say them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        none = default is None or default is False or default in ([], argparse.SUPPRESS)
        if none or not action.option_strings or "default" in text:
            return text
        return f"{text}{' ' if text else ''}(default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and of the ranks of a job only the first one says it.

    `in_script`: to a script that gave the arguments as keywords it says it with a ConfigError.
    """

    in_script = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "formatter_class": _Help})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(list(self._places(words)), namespace)

    def _places(self, words: Sequence[str]) -> Iterator[str]:
        """The words with `~` as a shell understands it, which leaves it alone in --output=~/run and
        knows no file of arguments. None may be empty: that is a variable that was never set."""
        option = ""
        for word in words:
            name, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
            option = name or option
            if option not in _TEXTS and (sign or not name):
                if not value:
                    self.error(f"{option or 'an argument'} has the value '', which names nothing")
                if value.startswith("~"):
                    value = os.path.expanduser(value)
            yield f"{name}{sign}{value}"

    def refuse(self, args: argparse.Namespace, options: Iterable[str], why: str) -> None:
        """End with "OPTION WHY" if one of these options was given, and not its default."""
        for option in options:
            action = self._option_string_actions[option]
            if getattr(args, action.dest) != action.default:
                self.error(f"{option} {why}")

    def error(self, message: str) -> NoReturn:
        if self.in_script:
            raise ConfigError(message)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # the launcher ends this rank when the first one has ended
        else:
            print(f"{self.prog}: {message}; see --help", file=sys.stderr, flush=True)
        sys.exit(2)


def whole(least: int = 0, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an argument that is an integer of at least `least` and at most `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text!r}"
            )
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {text!r}")
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
    given = [kind.strip() for kind in text.split(",") if kind.strip()]
    kinds = [RENAMED.get(kind, kind) for kind in given]
    unknown = [kind for kind in kinds if kind not in CHANGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CHANGES)}")
    return kinds


# --- arguments from elsewhere --------------------------------------------------------------------


def words_of(parser: argparse.ArgumentParser, options: Mapping[str, Any], where: str) -> list[str]:
    """Options by name as the words of a command line.

    Args:
        options: name, with dashes or underscores -> value; True and False of a switch, a list of
            what takes several with commas between, None for the default.
        where: they come from, for messages.

    Raises:
        ConfigError: for an option that the parser does not have, naming the nearest.
    """
    actions = _by_name(parser)
    words: list[str] = []
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise ConfigError(f"{where}: {key!r} is not an option; {nearest(name, list(actions))}")
        if value is not None:
            words += _words(actions[name], value, f"{where}: {key}")
    return words


def _by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    found = {action.dest: action for action in parser._actions if action.option_strings}
    return {name: found[name] for name in found if name not in ("help", "arguments")}


def _words(action: argparse.Action, value: Any, where: str) -> Iterator[str]:
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {value!r}")
        if value:
            yield action.option_strings[0]
        elif len(action.option_strings) > 1:
            yield action.option_strings[1]
        return
    parts = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, bool) or not all(
        isinstance(part, str | int | float | Path) for part in parts
    ):
        raise ConfigError(f"{where} must be a number or text, got {value!r}")
    yield f"{action.option_strings[0]}={','.join(map(str, parts))}"


def with_file(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """A command line behind the words of the file that its --arguments names; what the command
    line says too, or excludes, is left out of the file's.

    Raises:
        ConfigError: when the file cannot be read, or holds something else than options.
    """
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    only.add_argument("--arguments")
    path = only.parse_known_args(words)[0].arguments
    if path is None:
        return list(words)
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    own = {name for name, action in _by_name(parser).items() if given & {*action.option_strings}}
    for group in parser._mutually_exclusive_groups:
        names = {action.dest for action in group._group_actions}
        own |= names if names & own else set()
    options = _read_options(Path(path).expanduser())
    left = {key: value for key, value in options.items() if key.replace("-", "_") not in own}
    return [*words_of(parser, left, str(path)), *words]


def _read_options(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"cannot read the arguments in {path}: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(
            f"{path} must hold options by name, such as max_steps: 300, and nothing else"
        )
    return found
