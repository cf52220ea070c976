"""What a file holds that is not read, told by its name and its first bytes."""

from __future__ import annotations

import re
from pathlib import Path

from ds_local.data.compression import Input, endings
from ds_local.data.readers import READERS

_HEAD = 64 << 10  # bytes by which a file's kind is told

_TABLE = "is a table; write its text column as .jsonl, .csv or .parquet"
_UNNAMED = "is a table; give it a name that ends in .csv or .tsv, and --text-field"
_PACKED = "is compressed; give it a name that ends in .gz, .zst, .bz2 or .xz"
_ARCHIVE = "is an archive, or compressed otherwise than by gz, zst, bz2 and xz; unpack it"
_PAGES = "is a formatted document; save it as plain text"
_STORE = "is a database or a prepared dataset; write its text as .jsonl or .parquet"
_UTF16 = "is UTF-16; convert it to UTF-8"

# what is not read: by the end of its name, or by its first bytes
_REFUSED = {
    suffix: why
    for suffixes, why in (
        (".psv .xls .xlsx .xlsm .xlsb .ods .dta .sav .sas7bdat .rds .rdata", _TABLE),
        (".zstd .lzma .lz4 .br .z .sz .zip .7z .rar .tar .tgz .tbz .tbz2 .txz .tzst", _ARCHIVE),
        (".gz .zst .bz2 .xz", "is compressed twice; unpack it once"),
        (".pdf .doc .docx .odt .rtf .epub .mobi .ppt .pptx .odp", _PAGES),
        (".arrow .feather .avro .orc .db .sqlite .sqlite3 .h5 .hdf5 .tfrecord .lance", _STORE),
        (".mds .mdb .duckdb .warc", _STORE),
    )
    for suffix in suffixes.split()
}
_MAGIC = {
    b"\x1f\x8b": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,  # zstd
    b"BZh": _PACKED,
    b"\xfd7zXZ\x00": _PACKED,
    b"\x04\x22\x4d\x18": _ARCHIVE,  # lz4
    b"PK\x03\x04": _ARCHIVE,  # zip, and all that is zip inside
    b"7z\xbc\xaf\x27\x1c": _ARCHIVE,
    b"Rar!\x1a": _ARCHIVE,
    b"%PDF-": _PAGES,
    b"{\\rtf": _PAGES,
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": _PAGES,  # office before 2007
    b"PAR1": "is a parquet file; give it a name that ends in .parquet",
    b"ARROW1": _STORE,
    b"\xff\xff\xff\xff": _STORE,  # Arrow, as a stream
    b"Obj\x01": _STORE,  # Avro
    b"MMIDIDX": "lists Megatron's token ids; give the text they were made from",
    b"SQLite format 3\x00": _STORE,
    b"\x89HDF": _STORE,
    b"WARC/1.": _STORE,
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_PLAIN = {"", ".txt", ".text", ".dat", ".data", ".log"}  # may hold a table under another name


def why_unreadable(path: Path) -> str:
    """Why a file's text cannot be read, with the remedy; "" when it can, or there is none.

    Raises:
        DataError: when it is compressed and damaged at its beginning.
    """
    inside, _ = endings(path)
    if inside in _REFUSED:
        return _REFUSED[inside]
    with Input(path).open() as file:
        head = file.read(_HEAD)
    if inside == ".parquet":
        return ""
    found = next((why for magic, why in _MAGIC.items() if head.startswith(magic)), "")
    if found or inside in READERS:
        return found
    if head[257:262] == b"ustar":
        return _ARCHIVE
    if b"\0" in head:
        return ""
    if _looks_like_json(head):
        return "holds JSON; give it a name that ends in .jsonl (an object a line) or .json"
    return _UNNAMED if inside in _PLAIN and _looks_like_table(head) else ""


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
