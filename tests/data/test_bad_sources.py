"""Files and folders of all kinds that hold no text we read: one sentence each, and nothing made."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentences import one_sentence
from test_corpus import tokenizer, words  # noqa: F401 - a fixture
from test_kinds import LINES, TABLE, packed, parquet
from test_readers import lines, table, zstd

from ds_local.data.corpus import prepare
from ds_local.errors import DataError

ZIP, TAR = packed("zip"), packed("tar")
BINARY = bytes(range(256)) * 40
PROSE = words(400)


def stream():
    """Arrow as it is sent, not as it is kept."""
    buffer = io.BytesIO()
    rows = pa.table({"text": [PROSE]})
    with pa.ipc.new_stream(buffer, rows.schema) as writer:
        writer.write_table(rows)
    return buffer.getvalue()


def rows(*values):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(values, None if values else pa.string())}), buffer)
    return buffer.getvalue()


def bound(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(os.path.relpath(path))


ARCHIVE, DATABASE, PAGES, TABULAR = "unpack it", "is a database", "formatted document", "is a table"
NO_TEXT = "the sources hold no text"

# name, content, what is said beside the name
FILES = [
    ("a.odt", ZIP, PAGES),
    ("a.epub", ZIP, PAGES),
    ("a.mobi", BINARY, PAGES),
    ("a.pptx", ZIP, PAGES),
    ("a.ods", ZIP, TABULAR),
    ("a.dta", BINARY, TABULAR),
    ("a.sav", BINARY, TABULAR),
    ("a.sas7bdat", BINARY, TABULAR),
    ("a.RData", BINARY, TABULAR),
    ("a.feather", stream(), DATABASE),
    ("arrow", stream(), DATABASE),
    ("a.avro", b"Obj\x01" + BINARY, DATABASE),
    ("avro.txt", b"Obj\x01" + BINARY, DATABASE),
    ("a.orc", b"ORC" + BINARY, DATABASE),
    ("a.sqlite3", b"SQLite format 3\0" + BINARY, DATABASE),
    ("a.duckdb", BINARY, DATABASE),
    ("a.h5", b"\x89HDF" + BINARY, DATABASE),
    ("a.tfrecord", BINARY, DATABASE),
    ("shard.00000.mds", BINARY, DATABASE),
    ("a.warc", b"WARC/1.0\r\n" + PROSE.encode(), DATABASE),
    ("a.warc.gz", gzip.compress(b"WARC/1.0\r\n" + PROSE.encode()), DATABASE),
    ("CC-MAIN-0001.gz", gzip.compress(b"WARC/1.0\r\n" + PROSE.encode()), DATABASE),
    ("a.idx", b"MMIDIDX\0\0" + BINARY, "Megatron's token ids"),
    ("a.tar.gz", gzip.compress(TAR), ARCHIVE),
    ("a.tgz", gzip.compress(TAR), ARCHIVE),
    ("a.tar.xz", lzma.compress(TAR), ARCHIVE),
    ("tar.gz", gzip.compress(TAR), ARCHIVE),
    ("tar.txt", TAR, ARCHIVE),
    ("a.jsonl.zip", ZIP, ARCHIVE),
    ("a.7z", BINARY, ARCHIVE),
    ("a.rar", BINARY, ARCHIVE),
    ("a.jsonl.lz4", BINARY, ARCHIVE),
    ("a.txt.br", BINARY, ARCHIVE),
    ("a.txt.Z", BINARY, ARCHIVE),
    ("a.jsonl.lzma", BINARY, ARCHIVE),
    ("lz4.log", b"\x04\x22\x4d\x18" + BINARY, ARCHIVE),
    ("a.pdf.gz", gzip.compress(b"%PDF-1.7\n" + PROSE.encode()), PAGES),
    ("lines.txt.gz", gzip.compress(LINES.encode()), "ends in .jsonl"),
    ("table.txt.gz", gzip.compress(TABLE.encode()), "ends in .csv or .tsv"),
    ("utf16.csv", TABLE.encode("utf-16"), "convert it to UTF-8"),
    ("utf32.jsonl", LINES.encode("utf-32"), "convert it to UTF-8"),
    ("utf16.json", LINES.encode("utf-16"), "convert it to UTF-8"),
    ("half.json.gz", gzip.compress(LINES.encode())[:-20], "damaged or cut off"),
    ("half.jsonl.zst", zstd(LINES.encode())[:-20], "damaged or cut off"),
    ("half.csv.bz2", bz2.compress(TABLE.encode())[:-9], "damaged or cut off"),
    ("half.txt.xz", lzma.compress(PROSE.encode())[:-9], "damaged or cut off"),
    ("half.parquet.gz", gzip.compress(parquet(text=[PROSE]))[:-9], "damaged or cut off"),
    ("plain.gz", PROSE, "is no .gz file"),
    ("wrong.jsonl.xz", gzip.compress(LINES.encode()), "is no .xz file"),
    ("encrypted.parquet", b"PARE" + BINARY + b"PARE", "is no parquet file"),
    ("page.parquet", parquet(text=[PROSE] * 9).replace(b"PAR1", b"PAR2"), "is no parquet file"),
    ("list.parquet", rows(["a", "b"]), '"text" is list, not a string, nor messages'),
    ("struct.parquet", rows({"a": 1}), '"text" is dict'),
    ("none.parquet", rows(), NO_TEXT),
    ("null.parquet", rows(None, None), "left out: 2 empty"),
    ("dates.parquet", parquet(text=pa.array([1], pa.date32())), '"text" is date'),
    ("null.jsonl", "null\n", "line 1 is NoneType"),
    ("pretty.jsonl", json.dumps({"text": "a"}, indent=1), "line 1 is no JSON"),
    ("comma.jsonl", '{"text": "a"},\n', "line 1 is no JSON (Extra data"),
    ("quotes.jsonl", "{'text': 'a'}\n", "line 1 is no JSON"),
    ("comments.json", "// a list\n" + LINES, "is no JSON"),
    ("trailing.json", '[{"text": "a"},]', "is no JSON"),
    ("open.json", '[{"text": "a"}', "is no JSON"),
    ("two.json", '[{"text": "a"}]\n[{"text": "b"}]', "is no JSON"),
    ("number.json", "3", "entry 0 is int"),
    ("nested.json", '[[{"text": "a"}]]', "entry 0 is list"),
    ("empty.json", "[]", "left out: 1 empty (empty.json)"),
    ("blank.jsonl", "\n \n", "left out: 1 empty (blank.jsonl)"),
    ("blank.csv", "\n\n", "left out: 1 empty (blank.csv)"),
    ("header.csv", "text\n", "left out: 1 empty (header.csv)"),
    ("no-header.csv", "1,some words\n2,more words\n", "has the columns 1, some words"),
    ("spaces.tsv", "id text\n1 words\n", "has the columns id text"),
    ("ragged.csv", "text,id\na,1\nb\n", "line 3 has 1 fields, the header has 2"),
    ("quote.csv", 'text\n"a"b\n', "line 2 is no row of a table"),
    ("chat.jsonl", '{"text": [{"role": "user"}]}', '"text" is list'),
    ("chat-parts.jsonl", '{"text": [{"role": "a", "content": [1]}]}', '"content" is list'),
    ("empty.txt.gz", gzip.compress(b""), "left out: 1 empty (empty.txt.gz)"),
    ("model.safetensors", BINARY, "is no UTF-8 text"),
    ("a.npy", np.arange(9), "is no UTF-8 text"),
    ("a.pkl", pickle.dumps({"text": PROSE}), "is no UTF-8 text"),
    ("photo.txt", b"\xff\xd8\xff\xe0" + BINARY, "is no UTF-8 text"),
    ("latin.txt.bz2", bz2.compress("é".encode("latin-1") * 9), "is no UTF-8 text (invalid UTF-8)"),
    ("late.txt", PROSE.encode() * 99 + b"\0", "is no UTF-8 text (NUL bytes)"),
    ("pipe.jsonl", os.mkfifo, "pipe or a device"),
    ("socket", bound, "pipe or a device"),
    ("gone.jsonl", lambda path: path.symlink_to("nowhere"), "does not exist"),
    ("loop", lambda path: path.symlink_to(path), "does not exist"),
    ("null", lambda path: path.symlink_to("/dev/null"), "pipe or a device"),
]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(("name", "content", "said"), FILES, ids=[name for name, _, _ in FILES])
def test_a_bad_file_ends_in_one_sentence(tmp_path, tokenizer, monkeypatch, name, content, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    put(tmp_path / name, content)
    with one_sentence(name, said, error=DataError):
        prepare([str(tmp_path / name)], tokenizer, 16, tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()


def saved(folder):
    datasets.Dataset.from_dict({"text": [PROSE]}).save_to_disk(folder / "set")


def own_data(folder):
    (folder / "a.txt").write_text(PROSE)
    prepare([str(folder / "a.txt")], "sentencepiece:300", 16, folder / "made", progress=False)
    (folder / "a.txt").unlink()


def deep(folder):
    os.makedirs(folder / "/".join("folder" for _ in range(60)))


def web_dataset(folder):
    with tarfile.open(folder / "00000.tar", "w") as file:
        file.addfile(tarfile.TarInfo("0001.txt"))


GOOD = {"good.txt": PROSE}
# what is in a folder: files, or who makes it; what is said
FOLDERS = {
    "nothing": ({}, "left out: nothing"),
    "folders alone": (deep, "left out: nothing"),
    "hidden files": ({".a.txt": PROSE}, "1 hidden (.a.txt)"),
    "a repository's own files": ({".git/a": PROSE}, "1 hidden (.git)"),
    "empty files": ({"a.txt": "", "b.txt": "\n"}, "2 empty (a.txt, b.txt)"),
    "empty tables": ({"a.csv": "text\n", "b.parquet": rows()}, "2 empty (a.csv, b.parquet)"),
    "empty shards": ({"a.jsonl.gz": gzip.compress(b"")}, "1 empty (a.jsonl.gz)"),
    "pictures": ({"a.png": b"\x89PNG" + BINARY, "b.jpg": b"\xff\xd8" + BINARY}, "left out: 2 "),
    "broken links": (lambda p: (p / "a").symlink_to("nowhere"), "1 no plain file (a)"),
    "links in a circle": (lambda p: (p / "a").symlink_to(p), "1 linked folder (a)"),
    "pipes": (lambda p: os.mkfifo(p / "a"), "1 no plain file (a)"),
    "a saved dataset": (saved, "set/data-00000-of-00001.arrow is a database or a prepared dataset"),
    "a data folder of ours": (own_data, "made/train/data-00000-of-00001.arrow is a database"),
    "a tokenizer": ({"tokenizer.json": '{"model": 1}'}, "tokenizer.json, line 1 has the fields m"),
    "a model": (
        {"config.json": '{\n"model_type": "gpt2"\n}', "model.safetensors": BINARY},
        "config.json, entry 0 has the fields model_type",
    ),
    "a run": (
        {"metrics.jsonl": '{"step": 1, "loss": 2}\n', "log.txt": PROSE},
        "metrics.jsonl, line 1 has the fields step, loss",
    ),
    "streaming shards": ({"index.json": "{}", "shard.00000.mds": BINARY}, "shard.00000.mds is a"),
    "chunks": ({"index.json": '{"chunks": []}', "0.bin": BINARY}, "line 1 has the fields chunks"),
    "a web dataset": (web_dataset, "00000.tar is an archive"),
    "Megatron's tokens": ({"a.bin": BINARY, "a.idx": b"MMIDIDX\0" + BINARY}, "a.idx lists Megatr"),
    "records": (
        {"a.tfrecord-00000-of-00001": BINARY},
        "1 invalid UTF-8 (a.tfrecord-00000-of-00001)",
    ),
    "a Lance table": ({"a.lance/data/0.lance": BINARY}, "a.lance/data/0.lance is a database"),
    "a Delta table": (
        {"_delta_log/0.json": '{"protocol": {}}\n', "a.parquet": rows("a")},
        "_delta_log/0.json, line 1 has the fields protocol",
    ),
    "a Zarr store": (
        {".zgroup": "{}", "a/0.0": BINARY},
        "1 hidden (.zgroup), 1 invalid UTF-8 (a/0.0)",
    ),
    "a database and its log": ({"a.db": BINARY, "a.db-wal": BINARY}, "a.db is a database"),
    "a notebook among text": (GOOD | {"a.ipynb": '{"cells": []}'}, "a.ipynb holds JSON"),
    "a PDF among text": (GOOD | {"deep/er/a.pdf": b"%PDF-1.7"}, "--skip '*.pdf'"),
    "archives among text": (GOOD | {"a.zip": ZIP, "b.rar": ZIP}, "(so are b.rar)"),
    "UTF-16 among text": (GOOD | {"a.txt": PROSE.encode("utf-16")}, "a.txt is UTF-16"),
    "a table by another name": (GOOD | {"a.dat": TABLE}, "a.dat is a table; give it a name"),
    "a shard cut off": (
        {"a.jsonl.gz": gzip.compress(LINES.encode()), "b.jsonl.gz": gzip.compress(b"x" * 99)[:-9]},
        "b.jsonl.gz is no .gz file, damaged or cut off",
    ),
    "a shard with a bad line": (
        {"a.jsonl": LINES, "b.jsonl": LINES + "{\n"},
        "b.jsonl, line 31 is no JSON",
    ),
    "a table of other columns": (
        {"a.csv": table(["a"]), "b.csv": "body\nb\n"},
        "b.csv has the columns body",
    ),
    "a Parquet file of other columns": (
        {"a.parquet": rows("a"), "b.parquet": parquet(body=["b"])},
        "b.parquet has the columns body; name the one with text with --text-field",
    ),
    "a text of numbers": (
        {"a.parquet": rows("a"), "b.parquet": rows(3)},
        'b.parquet, row 0 "text" is int, not a string',
    ),
    "a field that is sometimes missing": (
        {"a.jsonl": lines(["a"]), "b.jsonl": '{"text": "a"}\n{"id": 3}\n'},
        "b.jsonl, line 2 has the fields id",
    ),
    "too little text": ({"a.txt": "aaa"}, "too few for train and validation sequences"),
    "one sequence": ({"a.txt": words(20)[:30]}, "too few for train and validation sequences"),
    "a name that is no UTF-8": (
        lambda p: (p / os.fsdecode(b"\xff.txt")).write_text(""),
        "1 empty (?.txt)",
    ),
    "a damaged file of such a name": (
        lambda p: (p / os.fsdecode(b"\xff.gz")).write_text("x"),
        "is no .gz file",
    ),
    "an office lock": ({"~$a.docx": BINARY}, "~$a.docx is a formatted document"),
    "a spreadsheet's copy": ({"a.xlsx": ZIP, "a.csv": "text\na\n"}, "a.xlsx is a table"),
    "two that cannot be read": ({"a.7z": BINARY, "b.doc": BINARY}, "(so are b.doc)"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_bad_folder_ends_in_one_sentence(tmp_path, tokenizer, what):  # noqa: F811
    folder = tmp_path / "corpus"
    folder.mkdir()
    content, said = FOLDERS[what]
    if callable(content):
        content(folder)
    else:
        for name, inside in content.items():
            put(folder / name, inside)
    with one_sentence(said, error=DataError):
        prepare([str(folder)], tokenizer, 16, tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()


def test_a_name_that_is_no_utf_8_is_read(tmp_path, tokenizer):  # noqa: F811
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / os.fsdecode(b"\xff.txt")).write_text(PROSE)
    (tmp_path / "corpus" / os.fsdecode(b"\xff.md")).write_text("")
    facts = prepare([str(tmp_path / "corpus")], tokenizer, 16, tmp_path / "data", progress=False)
    assert facts["skipped_names"] == {"empty": ["?.md"]}


def test_there_are_enough_of_them():
    assert min(len(FILES), len(FOLDERS)) >= 40
