"""Sources: how they are named, which of their files are read, left out by name, or refused."""

import gzip
import os

import datasets
import pytest
from sentences import one_sentence
from test_corpus import words
from test_kinds import LINES, TABLE, write

from ds_local.data.corpus import prepare
from ds_local.data.documents import Reading
from ds_local.data.sources import Source, documents, parse_source, parse_sources
from ds_local.errors import DataError


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ("texts", Source("texts", "texts")),
        ("texts@0.3", Source("texts", "texts", 0.3)),
        ("web=texts/a.jsonl@2", Source("web", "texts/a.jsonl", 2.0)),
        ("web=texts", Source("web", "texts")),
        ("hub:user/name:part", Source("hub:user/name:part", "hub:user/name:part")),
        ("c-4.en=hub:user/name:part@1e-3", Source("c-4.en", "hub:user/name:part", 0.001)),
        ("python-stdlib@1", Source("python-stdlib", "python-stdlib", 1.0)),
        ("/data/run=3/a.txt", Source("/data/run=3/a.txt", "/data/run=3/a.txt")),
        ("code=/data/run=3/a.txt@4", Source("code", "/data/run=3/a.txt", 4.0)),
    ],
)
def test_a_source_has_a_name_and_a_weight(given, source):
    assert parse_source(given) == source


def test_what_exists_is_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b@3", "a@3", "b@3", "a=b"):
        (tmp_path / name).write_text("x")
        assert parse_source(name) == Source(name, name)
    assert parse_source("c=a@3@0.5") == Source("c", "a@3", 0.5)
    assert parse_source("c=b@3") == Source("c", "b@3")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["texts@much"], "has the weight 'much'; give a number above 0"),
        (["texts@0"], "has the weight '0'"),
        (["texts@-1"], "has the weight '-1'"),
        (["texts@nan"], "has the weight 'nan'"),
        (["texts@inf"], "has the weight 'inf'"),
        (["a=texts@"], "has the weight ''"),
        (["texts@1", "more"], "source 'more' has no weight but 'texts' has"),
        (["a/x@1", "a/x@2"], "two sources have the name 'a/x'"),
        (["w=a@1", "w=b@2"], "two sources have the name 'w'; name them apart"),
    ],
)
def test_weights_that_make_no_sense(given, said):
    with one_sentence(said, error=DataError):
        parse_sources(given)


def test_it_is_refused_before_anything_is_read(tmp_path):
    write(tmp_path / "a.txt", words(100))
    write(tmp_path / "b.xls", TABLE)
    write(tmp_path / "c.gz.gz", gzip.compress(b"x"))
    with one_sentence(f"{tmp_path}/b.xls", "--skip '*.xls'", "so are c.gz.gz"):
        documents([str(tmp_path / "a.txt"), str(tmp_path)], Reading())


def test_what_is_left_out_is_named(tmp_path):
    for number in range(7):
        write(tmp_path / f"empty{number}.txt", " \n")
    write(tmp_path / "good.txt", words(100))
    write(
        tmp_path / "rows.jsonl",
        LINES.encode() + b'{"text": null}\n{"text": "\xff"}\n{"text": "\\ud800"}\n',
    )
    write(tmp_path / ".hidden", "x")
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "config", words(100))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    reading = Reading()
    names = {d.name.split(":")[0] for d in documents([str(tmp_path)], reading)}
    skipped = reading.skipped
    assert names == {"good.txt", "rows.jsonl"}
    assert dict(skipped.counts) == {
        "hidden": 2,
        "linked folder": 1,
        "no plain file": 2,
        "empty": 8,
        "invalid UTF-8": 2,
    }
    assert "empty0.txt, empty1.txt" in str(skipped)
    assert sorted(skipped.names["hidden"]) == [".git", ".hidden"]
    assert skipped.names["invalid UTF-8"] == ["rows.jsonl:31", "rows.jsonl:32"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: "", "''"),
        (lambda p: p / "nowhere", "nowhere"),
        (lambda p: p / ("x" * 300), "File name too long"),
        (lambda p: os.mkfifo(p / "pipe") or p / "pipe", "pipe or a device"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "hold no text; left out: nothing"),
        (lambda p: write(p / "blank.txt", " \n"), "1 empty (blank.txt)"),
        (
            lambda p: (
                datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(p / "set") or p / "set"
            ),
            "prepared dataset",
        ),
    ],
)
def test_sources_without_text(tmp_path, make, said):
    with one_sentence(said):
        prepare([str(make(tmp_path))], "sentencepiece:300", 16, tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()
