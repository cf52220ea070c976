"""Documents from every form of file."""

import json

import datasets
import pyarrow as pa
import pytest
from test_sources import LINES, ROWS, parquet, write

from ds_local.data.readers import Skipped, documents_of, hub
from ds_local.data.sources import documents
from ds_local.errors import DataError


@pytest.mark.parametrize(
    "how",
    [
        "jsonl",
        "ndjson",
        "blank lines",
        "json list",
        "json strings",
        "json lines",
        "parquet",
        "bytes",
        "dictionary",
    ],
)
def test_the_same_text_from_every_form(tmp_path, how):
    texts = [row["text"] for row in ROWS]
    name, content = {
        "jsonl": ("a.jsonl", LINES),
        "ndjson": ("a.ndjson", LINES),
        "blank lines": ("a.jsonl", "\n" + LINES + "\n  \n"),
        "json list": ("a.json", json.dumps(ROWS, indent=1)),
        "json strings": ("a.json", json.dumps(texts)),
        "json lines": ("a.json", LINES),
        "parquet": ("a.parquet", parquet(text=texts, id=list(range(30)))),
        "bytes": ("a.parquet", parquet(text=[text.encode() for text in texts])),
        "dictionary": ("a.parquet", parquet(text=pa.array(texts).dictionary_encode())),
    }[how]
    write(tmp_path / name, content)
    assert [d.text for d in documents([str(tmp_path / name)], Skipped())] == texts


def read(folder, skipped=None):
    skipped = Skipped() if skipped is None else skipped
    return list(documents_of(folder, sorted(folder.iterdir()), skipped))


def test_a_document_has_the_name_of_its_file_and_its_number(tmp_path):
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.JSONL", '{"text": "two"}\n\n{"text": "three"}\n')
    assert [tuple(document) for document in read(tmp_path)] == [
        ("a.txt:0", "one"),
        ("b.JSONL:0", "two"),
        ("b.JSONL:1", "three"),
    ]


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    assert read(tmp_path)[0].text == "hello"


def test_what_is_no_text_is_counted_with_the_first_names(tmp_path):
    for number in range(7):
        write(tmp_path / f"{number}.txt", " \n")
    write(tmp_path / "x.json", json.dumps(["fine", "a\0b", "\ud800"]))
    skipped = Skipped()
    assert [document.text for document in read(tmp_path, skipped)] == ["fine"]
    assert str(skipped) == (
        "7 empty (0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ...), 1 NUL bytes (x.json:1), "
        "1 invalid UTF-8 (x.json:2)"
    )
    again = Skipped(skipped.counts, skipped.names)
    again.add("empty", "8.txt")
    assert again.counts["empty"] == 8
    assert bool(again)
    assert not Skipped()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        list(documents_of(tmp_path, [tmp_path / "gone.txt"], Skipped()))


def test_rows_of_a_dataset_are_documents(monkeypatch):
    asked = []

    def load_dataset(path, config, **how):
        asked.append((path, config))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": None}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    skipped = Skipped()
    found = list(hub("user/name:part", skipped))
    assert [tuple(d) for d in found] == [("user/name:part:0", "one"), ("user/name:part:2", "two")]
    assert asked == [("user/name", "part")]
    assert str(skipped) == "1 empty (user/name:part:1)"


def test_a_dataset_that_breaks_off_is_named(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("the hub is away\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    found = hub("user/name", Skipped())
    assert next(found).text == "one"
    with pytest.raises(DataError, match=r"cannot read on in the dataset 'user/name': the hub is"):
        next(found)
