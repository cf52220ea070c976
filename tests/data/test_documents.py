"""Documents with names, in pieces where they are long; what is left out is counted."""

import gzip
import json

import datasets
import pytest
from test_corpus import words
from test_kinds import LINES, ROWS, parquet, write

from ds_local.data.documents import Document, Reading, documents_of, hub_documents, same_name
from ds_local.data.readers import PIECE
from ds_local.errors import DataError


def read(folder, **how):
    return list(documents_of(folder, sorted(folder.iterdir()), Reading(**how)))


def test_a_document_has_the_name_of_its_file_and_its_number(tmp_path):
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.JSONL", '{"text": "two"}\n\n{"text": "three"}\n')
    assert read(tmp_path) == [
        Document("a.txt:0", "one"),
        Document("b.JSONL:0", "two"),
        Document("b.JSONL:1", "three"),
    ]


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    assert read(tmp_path)[0].text == "hello"


@pytest.mark.parametrize("form", ["txt", "txt.gz", "jsonl"])
@pytest.mark.parametrize("pieces", [1, 2, 130])  # more than are held are read a second time
def test_a_long_document_comes_in_pieces(tmp_path, form, pieces):
    text = "héllo wörld, a line\r\n" * (pieces * PIECE // 21)
    text = text[: (pieces - 1) * PIECE + 3] + "☃"
    content = json.dumps({"text": text}) if form == "jsonl" else text
    packed = gzip.compress(content.encode()) if form.endswith("gz") else content.encode()
    write(tmp_path / f"a.{form}", packed)
    found = read(tmp_path)
    assert "".join(document.text for document in found) == text
    assert [document.start for document in found] == [PIECE * i for i in range(pieces)]
    assert [document.ends for document in found] == [False] * (pieces - 1) + [True]


def test_what_is_no_text_far_behind_is_left_out_whole(tmp_path):
    write(tmp_path / "nul.txt", "text " * PIECE + "\0")
    write(tmp_path / "latin.txt", b"text " * PIECE + b"\xe9")
    reading = Reading()
    assert list(documents_of(tmp_path, sorted(tmp_path.iterdir()), reading)) == []
    assert reading.skipped.counts == {"NUL bytes": 1, "invalid UTF-8": 1}


def test_bytes_are_told_as_they_are_read(tmp_path):
    write(tmp_path / "a.txt", "words " * 9)
    write(tmp_path / "b.jsonl", LINES * 50)
    write(tmp_path / "c.parquet", parquet(text=[words(9)] * 3000))
    write(tmp_path / "d.csv.gz", gzip.compress(("text\n" + "some words\n" * 90_000).encode()))
    write(tmp_path / "empty.txt", "")
    told = []
    documents = read(tmp_path, on_bytes=told.append)
    assert len(documents) == 1 + 50 * len(ROWS) + 3000 + 90_000
    assert sum(told) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sum(1 for count in told if count) > 10
    assert min(told) >= 0


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.jsonl:3", "a.jsonl:3"),
        ("deep/a.parquet:3", "deep/a.jsonl:3"),
        ("a.csv.zst:3", "a.jsonl:3"),
        ("a.b.json.xz:12", "a.b.jsonl:12"),
        ("a.txt.gz:0", "a.txt:0"),
        ("a.py:0", "a.py:0"),
        ("user/name:part:7", "user/name:part:7"),
    ],
)
def test_a_name_does_not_depend_on_the_form_of_a_file(name, plain):
    assert same_name(name) == plain


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        list(documents_of(tmp_path, [tmp_path / "gone.txt"], Reading()))


def test_rows_of_a_dataset_are_documents(monkeypatch):
    asked = []

    def load_dataset(path, config, **how):
        asked.append((path, config))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": None}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reading = Reading()
    found = list(hub_documents("user/name:part", reading))
    assert found == [Document("user/name:part:0", "one"), Document("user/name:part:2", "two")]
    assert asked == [("user/name", "part")]
    assert str(reading.skipped) == "1 empty (user/name:part:1)"


def test_a_dataset_that_breaks_off_is_named(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("the hub is away\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    found = hub_documents("user/name", Reading())
    assert next(found).text == "one"
    with pytest.raises(DataError, match=r"cannot read on in the dataset 'user/name': the hub is"):
        next(found)
