"""Files, folders and hub datasets -> documents.

A file that holds text in a form we do not read (a table, something compressed, an office document)
is refused by name, so that nothing is trained on as prose by accident and nothing is left out in
silence. What holds no text at all is left out, counted and named.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ds_local.data.readers import (
    NAMED,
    READERS,
    Document,
    Skipped,
    documents_of,
    hub,
    unreadable,
)
from ds_local.errors import DataError

_HEAD = 64 << 10  # bytes by which a file's kind is told

_TABLE = "is a table; write its text column as .jsonl or .parquet"
_PACKED = "is compressed or an archive; unpack it"
_PAGES = "is a formatted document; save it as plain text"
_STORE = "is a database or a prepared dataset; write its text as .jsonl or .parquet"
_UTF16 = "is UTF-16; convert it to UTF-8"

# what is not read: by the end of its name, or by its first bytes
_REFUSED = {
    suffix: why
    for suffixes, why in (
        (".csv .tsv .psv .xls .xlsx .xlsm .xlsb .ods .dta .sav", _TABLE),
        (".gz .zst .zstd .bz2 .xz .lzma .lz4 .br .z .zip .7z .rar .tar .tgz .tbz2 .txz", _PACKED),
        (".pdf .doc .docx .odt .rtf .epub .mobi .ppt .pptx .odp", _PAGES),
        (".arrow .feather .avro .orc .db .sqlite .sqlite3 .h5 .hdf5 .tfrecord .lance", _STORE),
    )
    for suffix in suffixes.split()
}
_MAGIC = {
    b"\x1f\x8b": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,  # zstd
    b"BZh": _PACKED,
    b"\xfd7zXZ\x00": _PACKED,
    b"\x04\x22\x4d\x18": _PACKED,  # lz4
    b"PK\x03\x04": _PACKED,  # zip, and all that is zip inside
    b"7z\xbc\xaf\x27\x1c": _PACKED,
    b"Rar!\x1a": _PACKED,
    b"%PDF-": _PAGES,
    b"{\\rtf": _PAGES,
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": _PAGES,  # office before 2007
    b"PAR1": "is a parquet file; give it a name that ends in .parquet",
    b"ARROW1": _STORE,
    b"SQLite format 3\x00": _STORE,
    b"\x89HDF": _STORE,
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_PLAIN = {"", ".txt", ".text", ".dat", ".data", ".log"}  # may hold a table under another name


def documents(
    sources: Sequence[str], skipped: Skipped, skip: Sequence[str] = ()
) -> Iterator[Document]:
    """All documents of the sources, in a fixed order; what is no text is added to `skipped`.

    Args:
        sources: "python-stdlib", "hub:NAME" or "hub:NAME:CONFIG" (the train split of a Hugging Face
            dataset), files or folders. A line of .jsonl or .ndjson, an entry of a .json list and a
            row of .parquet is a document (its "text" field); any other file is one document.
        skip: patterns of files in folders to leave out, as in "*.csv".

    Raises:
        DataError: when a source does not exist, has no text field, or holds text in a form that is
            not read (all files are looked at before the first document), or when there is no text.
    """
    readers = [_reader(source, skipped, skip) for source in sources]
    return _some(itertools.chain.from_iterable(reader() for reader in readers), skipped)


def _some(found: Iterator[Document], skipped: Skipped) -> Iterator[Document]:
    first = next(found, None)
    if first is None:
        raise DataError(f"the sources hold no text; left out: {skipped or 'nothing'}")
    yield from itertools.chain([first], found)


def _reader(source: str, skipped: Skipped, skip: Sequence[str]) -> Callable[[], Iterator[Document]]:
    if source.startswith("hub:"):
        return lambda: hub(source.removeprefix("hub:"), skipped)
    try:
        if source == "python-stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            files = sorted(_stdlib_files(root))
        else:
            root = Path(source)
            files = _files_of(source, skipped, skip)
        _refuse_unreadable(root, files)
    except OSError as error:
        raise unreadable(error.filename or source, error) from error
    return lambda: documents_of(root, files, skipped)


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
                skipped.add(reason, str(path.relative_to(root)))
                subfolders.remove(path.name)
        for path in (Path(folder) / name for name in names):
            name = str(path.relative_to(root))
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
    refused = [(path, why) for path in files if (why := _why_unreadable(path))]
    if not refused:
        return
    path, why = refused[0]
    more = [str(other.relative_to(root)) for other, _ in refused[1:]]
    also = f" (so are {', '.join(more[:NAMED])}{', ...' * (len(more) > NAMED)})" if more else ""
    left_out = (
        "" if path == root else f", or leave it out with --skip '*{path.suffix or path.name}'"
    )
    raise DataError(f"{path} {why}{left_out}{also}")


def _why_unreadable(path: Path) -> str:
    """Why a file's text cannot be read, with the remedy; "" when it can, or there is none."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if suffix in _REFUSED:
        return _REFUSED[suffix]
    if suffix == ".parquet":
        return ""
    found = next((why for magic, why in _MAGIC.items() if head.startswith(magic)), "")
    if found or suffix in READERS or b"\0" in head:
        return found
    if head[257:262] == b"ustar":
        return _PACKED
    if _looks_like_json(head):
        return "holds JSON; give it a name that ends in .jsonl (an object a line) or .json"
    return _TABLE if suffix in _PLAIN and _looks_like_table(head) else ""


def _looks_like_json(head: bytes) -> bool:
    """Does it begin with an object, or a list of them?"""
    start = rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"[^"\n]{0,99}"\s*:'
    return re.match(start, head) is not None


def _looks_like_table(head: bytes) -> bool:
    """A header of short, different names, and as many fields as it has in all of the next lines?"""
    first, *lines = head.decode("utf-8-sig", "replace").splitlines()[:21] or [""]
    for separator, fewest in (("\t", 2), (",", 3), (";", 3), ("|", 3)):
        names = [name.strip().strip('"') for name in first.split(separator)]
        header = len(set(names)) == len(names) >= fewest and all(
            re.fullmatch(r"[^\W\d][\w .-]{0,30}", name) for name in names
        )
        counts = [re.sub(r'"[^"]*"', "", line).count(separator) for line in lines[:-1]]
        if header and len(counts) > 2 and set(counts) == {len(names) - 1}:
            return True
    return False
