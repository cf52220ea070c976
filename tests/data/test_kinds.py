"""What is not read is refused by name, before anything is read; prose is not taken for it."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentences import one_sentence
from test_corpus import words

from ds_local.data.documents import Reading
from ds_local.data.sources import documents
from ds_local.errors import DataError

ROWS = [{"text": words(20, seed), "id": seed} for seed in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "id,name,text\n" + "".join(f"{i},n{i},{words(5, i)}\n" for i in range(30))


def packed(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.txt", words(100))
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


def arrow():
    buffer = io.BytesIO()
    table = pa.table({"text": [words(10)]})
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def database(path):
    with sqlite3.connect(path) as file:
        file.execute("create table a (text)")
    file.close()
    return path.read_bytes()


# name, content, what the sentence says beside the name
REFUSED = [
    ("a.psv", TABLE.replace(",", "|"), "is a table"),
    ("a.PSV", TABLE.replace(",", "|"), "is a table"),
    ("comma.txt", TABLE, "is a table"),
    ("tab.txt", TABLE.replace(",", "\t"), "is a table"),
    ("semicolon", TABLE.replace(",", ";"), "is a table"),
    ("quoted.txt", TABLE.replace("n1,", '"n, 1",'), "is a table"),
    (
        "two.txt",
        "label\ttext\n" + "".join(f"{i}\t{words(9, i)}\n" for i in range(30)),
        "is a table",
    ),
    ("a.xlsx", packed("zip"), "is a table"),
    ("a.jsonl.gz.gz", gzip.compress(gzip.compress(LINES.encode())), "compressed twice"),
    ("a.txt.zst", b"\x28\xb5\x2f\xfd" + bytes(range(50)), "is no .zst file"),
    ("a.zip", packed("zip"), "unpack it"),
    ("a.tar", packed("tar"), "unpack it"),
    ("gz.txt", gzip.compress(words(100).encode()), "ends in .gz, .zst, .bz2 or .xz"),
    ("gz.jsonl", gzip.compress(LINES.encode()), "ends in .gz, .zst, .bz2 or .xz"),
    ("xz", lzma.compress(words(100).encode()), "ends in .gz, .zst, .bz2 or .xz"),
    ("bz2.log", bz2.compress(words(100).encode()), "ends in .gz, .zst, .bz2 or .xz"),
    ("zip.txt", packed("zip"), "unpack it"),
    ("a.pdf", b"%PDF-1.7\n" + words(100).encode(), "formatted document"),
    ("pdf.txt", b"%PDF-1.7\n" + words(100).encode(), "formatted document"),
    ("a.docx", packed("zip"), "formatted document"),
    ("a.rtf", b"{\\rtf1 " + words(100).encode(), "formatted document"),
    ("a.arrow", arrow(), "prepared dataset"),
    ("arrow.txt", arrow(), "prepared dataset"),
    ("a.db", database, "database"),
    ("lines.txt", LINES, "ends in .jsonl"),
    ("lines.log", "\n\n" + LINES, "ends in .jsonl"),
    ("list.txt", json.dumps(ROWS), "ends in .jsonl"),
    ("pretty.txt", json.dumps(ROWS[0], indent=2), "ends in .jsonl"),
    ("book.ipynb", json.dumps({"cells": []}, indent=1), "ends in .jsonl"),
    ("parquet.txt", parquet(text=[words(50)]), "ends in .parquet"),
    ("utf16.txt", words(100).encode("utf-16"), "convert it to UTF-8"),
]
# the same, found while it is read
MALFORMED = [
    (
        "object.jsonl",
        LINES + '{"body": "x"}\n',
        'line 31 has the fields body; an object with a "text" field',
    ),
    ("half.jsonl", LINES + '{"text": "x', "line 31 is no JSON"),
    ("words.jsonl", "some words\n", "line 1 is no JSON"),
    ("number.jsonl", '\n\n{"text": 3}\n', 'line 3 "text" is int, not a string'),
    ("nested.jsonl", '{"text": {"a": "b"}}\n', 'line 1 "text" is dict'),
    ("list.jsonl", '["a", "b"]\n', "line 1 is list, not an object"),
    ("deep.jsonl", "[" * 100_000 + "\n", "line 1 is no JSON"),
    ("one.json", json.dumps({"data": ROWS}), "line 1 has the fields data"),
    ("half.json", json.dumps(ROWS)[:-9], "is no JSON"),
    ("words.json", "some words", "is no JSON"),
    ("mixed.json", '[{"text": "a"}, 4]', "entry 1 is int"),
    (
        "body.parquet",
        parquet(body=["x"]),
        "has the columns body; name the one with text with --text-field",
    ),
    ("number.parquet", parquet(text=[1, 2]), '"text" is int'),
    ("words.parquet", words(100), "is no parquet file"),
    ("half.parquet", parquet(text=[words(50)])[:-30], "is no parquet file"),
    ("empty.parquet", "", "is no parquet file"),
    ("names.csv", TABLE.replace("text", "body"), "has the columns id, name, body; name the one"),
    ("none.csv", "\n\n3\n", "has the columns 3; name the one"),
    ("wide.csv", TABLE + "1,2,3,4\n", "line 32 has 4 fields, the header has 3"),
    ("quote.csv", TABLE + '1,2,"open\n', "line 32 is no row of a table"),
    ("narrow.tsv", "id\ttext\n1\n", "line 2 has 1 fields, the header has 2"),
]


def write(path, content):
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    REFUSED + MALFORMED,
    ids=[f"{name} {said}" for name, _, said in REFUSED + MALFORMED],
)
def test_what_holds_text_that_is_not_read_is_refused_by_name(tmp_path, name, content, said):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "aa.txt").write_text(words(500))
    bad = write(folder / name, content)
    for source in (bad, folder):  # by itself, and among others
        with one_sentence(str(bad), said, error=DataError):
            list(documents([str(source)], Reading()))
    found = documents([str(folder)], Reading(), [name])
    assert [d.name for d in found] == ["aa.txt:0"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"abc\0def", "NUL bytes"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "invalid UTF-8"),
        ("latin.txt", "é".encode("latin-1") * 9, "invalid UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_by_itself_and_named_among_others(tmp_path, name, content, said):
    write(tmp_path / "a.txt", words(100))
    bad = write(tmp_path / name, content)
    with one_sentence(str(bad), said):
        list(documents([str(bad)], Reading()))
    reading = Reading()
    assert len(list(documents([str(tmp_path)], reading))) == 1
    assert str(reading.skipped) == f"1 {said} ({name})"


@pytest.mark.parametrize(
    "text",
    [
        "a, b and c\nd, e and f\n" * 30,
        "{not json} at all\n" * 30,
        "name: value\nother: value\n" * 30,
        "import os\nx = {'a': 1}\n" * 30,
        "[1] A reference, from 1999.\n" * 30,
        "one word a line\n" * 30,
    ],
)
def test_prose_is_not_taken_for_something_else(tmp_path, text):
    write(tmp_path / "a.txt", text)
    assert [d.text for d in documents([str(tmp_path / "a.txt")], Reading())] == [text]
