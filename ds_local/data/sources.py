"""Sources as they are named on the command line -> documents.

A file that holds text in a form we do not read (something compressed otherwise, an office document,
a database) is refused by name, so that nothing is trained on as prose by accident and nothing is
left out in silence. What holds no text at all is left out, counted and named.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ds_local.data.documents import (
    Document,
    Reading,
    documents_of,
    hub_documents,
    printable,
    unreadable,
)
from ds_local.data.kinds import why_unreadable
from ds_local.data.left_out import NAMED, Skipped
from ds_local.errors import DataError

T = TypeVar("T")

_HUB = "hub:"
_STDLIB = "python-stdlib"


class Source(NamedTuple):
    """Where text comes from, and its weight among the others, None where none was given."""

    name: str
    place: str
    weight: float | None = None


def parse_source(given: str) -> Source:
    """A source as the command line has it: [NAME=]PLACE[@WEIGHT], or a place that exists.

    Raises:
        DataError: when the weight is no number above 0.
    """
    if not given.strip() or os.path.exists(given):
        return Source(given, given)
    name, place, weight = "", given, None
    if found := re.match(r"([\w.-]+)=(.+)", place):
        name, place = found.groups()
    if not os.path.exists(place) and "@" in place:
        place, _, number = place.rpartition("@")
        weight = _weight(number, given)
    return Source(name or place, place, weight)


def _weight(number: str, given: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise DataError(
            f"source {given!r} has the weight {number!r}; give a number above 0, as in "
            "code=texts/code@0.3"
        )
    return weight


def parse_sources(given: Sequence[str]) -> list[Source]:
    """Sources as the command line has them. Without weights, those of one name are one.

    Raises:
        DataError: when some have a weight and others none, or two with weights have one name.
    """
    sources = [parse_source(one) for one in given]
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source for source in sources if source.weight is None)
        raise DataError(
            f"source {without.place!r} has no weight but {weighted[0].name!r} has; give every "
            "source one, as in texts/code@0.3, or none"
        )
    names = [source.name for source in weighted]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"two sources have the name {twice[0]!r}; name them apart, as in other={twice[0]}@0.3"
        )
    return sources


def documents(
    sources: Sequence[str], reading: Reading | None = None, skip: Sequence[str] = ()
) -> Iterator[Document]:
    """All documents of places, in a fixed order; what is no text is added to `reading.skipped`.

    Args:
        sources: "python-stdlib", "hub:NAME" or "hub:NAME:CONFIG" (the train split of a Hugging Face
            dataset), files or folders. A line of .jsonl or .ndjson, an entry of a .json list and a
            row of .csv, .tsv or .parquet is a document; any other file is one document. All of
            them may be compressed.
        skip: patterns of files in folders to leave out, as in "*.pdf".

    Raises:
        DataError: when a source does not exist, has no text field, or holds text in a form that is
            not read (all files are looked at before the first document), or when there is no text.
    """
    reading = Reading() if reading is None else reading
    found = open_sources([Source(place, place) for place in sources], reading, skip)
    return some((document for _, document in found.documents()), reading.skipped)


class Opened(NamedTuple):
    """Sources whose files have been found and looked at.

    `num_bytes`: of all files; None when a source is on the hub. `files`: by source and root.
    """

    readers: list[tuple[Source, Callable[[], Iterator[Document]]]]
    num_bytes: int | None
    files: list[tuple[Source, Path, list[Path]]]

    def documents(self) -> Iterator[tuple[Source, Document]]:
        """All documents, each with its source."""
        for source, read in self.readers:
            for document in read():
                yield source, document


def open_sources(sources: Sequence[Source], reading: Reading, skip: Sequence[str] = ()) -> Opened:
    """Find all files of the sources. Raises DataError, see `documents`."""
    readers: list[tuple[Source, Callable[[], Iterator[Document]]]] = []
    sizes: list[int | None] = []
    files_of: list[tuple[Source, Path, list[Path]]] = []
    for source in sources:
        if source.place.startswith(_HUB):
            name = source.place.removeprefix(_HUB)
            readers.append((source, functools.partial(hub_documents, name, reading)))
            sizes.append(None)
            continue
        root, files = _find(source.place, reading.skipped, skip)
        readers.append((source, functools.partial(documents_of, root, files, reading)))
        sizes.extend(path.stat().st_size for path in files)
        files_of.append((source, root, files))
    known = [size for size in sizes if size is not None]
    return Opened(readers, sum(known) if len(known) == len(sizes) else None, files_of)


def check_disjoint(train: Opened, validation: Opened) -> None:
    """No file is read for both.

    Raises:
        DataError: naming the first file, its sources and the pattern that leaves it out.
    """
    known = {
        os.path.realpath(path): (source, root, path)
        for source, root, files in train.files
        for path in files
    }
    for other, inner, files in validation.files:
        for path in files:
            if os.path.realpath(path) not in known:
                continue
            source, outer, own = known[os.path.realpath(path)]
            pattern = _pattern(inner, path, outer) or _pattern(outer, own, inner)
            if not pattern:
                pattern = printable((own if outer.is_dir() else path).name)
            leave = f"leave it out of the folder with --skip '{pattern}', or "
            raise DataError(
                f"{path} of the validation source {other.place} is also in the source "
                f"{source.place}, and would be trained on; "
                f"{leave if source.place != _STDLIB else ''}give other text to one of them"
            )


def _pattern(folder: Path, file: Path, inside: Path) -> str:
    """What leaves `inside`, or `file` where that is none, out of the folder that it lies in; ""
    where it does not."""
    outer, inner = Path(os.path.realpath(folder)), Path(os.path.realpath(inside))
    if outer not in inner.parents:
        return ""
    return printable(
        f"{inner.relative_to(outer)}/*" if inner.is_dir() else file.relative_to(folder)
    )


def some(found: Iterator[T], skipped: Skipped) -> Iterator[T]:
    """The same, when there is anything. Raises DataError."""
    first = next(found, None)
    if first is None:
        raise DataError(f"the sources hold no text; left out: {skipped or 'nothing'}")
    yield from itertools.chain([first], found)


def _find(place: str, skipped: Skipped, skip: Sequence[str]) -> tuple[Path, list[Path]]:
    """(the root of a place, its files), none of which has to be refused."""
    try:
        if place == _STDLIB:
            root = Path(sysconfig.get_paths()["stdlib"])
            files = sorted(_stdlib_files(root))
        else:
            root = Path(place)
            files = _files_of(place, skipped, skip)
        _refuse_unreadable(root, files)
    except OSError as error:
        raise unreadable(error.filename or place, error) from error
    return root, files


# --- which files


def _stdlib_files(root: Path) -> Iterator[Path]:
    leave_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - leave_out)
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _files_of(source: str, skipped: Skipped, skip: Sequence[str]) -> list[Path]:
    """The files of a source, sorted; those left out are counted."""
    root = Path(source)
    if not str(source).strip() or not root.exists():
        raise DataError(
            f"source {str(source)!r} does not exist; give a file, a folder, python-stdlib or "
            "hub:NAME"
        )
    if not root.is_dir():
        if not root.is_file():
            raise DataError(f"{root} is a pipe or a device, which can be read only once; save it")
        return [root]

    def stop(error: OSError) -> None:
        raise error

    kept = []
    for folder, subfolders, names in os.walk(root, onerror=stop):
        for path in [Path(folder) / name for name in subfolders]:
            reason = "hidden" if path.name.startswith(".") else "linked folder"
            if reason == "hidden" or path.is_symlink():
                skipped.add(reason, printable(path.relative_to(root)))
                subfolders.remove(path.name)
        for path in (Path(folder) / name for name in names):
            name = printable(path.relative_to(root))
            if any(fnmatch.fnmatch(one, pattern) for pattern in skip for one in (name, path.name)):
                skipped.add("left out by --skip", name)
            elif path.name.startswith("."):
                skipped.add("hidden", name)
            elif not path.is_file():
                skipped.add("no plain file", name)
            else:
                kept.append(path)
    return sorted(kept)


def _refuse_unreadable(root: Path, files: Iterable[Path]) -> None:
    """Raises DataError, with the names of the files that hold text in a form that is not read."""
    refused = [(path, why) for path in files if (why := why_unreadable(path))]
    if not refused:
        return
    path, why = refused[0]
    more = [printable(other.relative_to(root)) for other, _ in refused[1:]]
    also = f" (so are {', '.join(more[:NAMED])}{', ...' * (len(more) > NAMED)})" if more else ""
    left_out = (
        "" if path == root else f", or leave it out with --skip '*{path.suffix or path.name}'"
    )
    raise DataError(f"{path} {why}{left_out}{also}")
