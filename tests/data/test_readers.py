"""The same text in every form: the same documents, and the same tokens."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentences import one_sentence
from test_corpus import tokenizer, words  # noqa: F401 - a fixture
from test_kinds import LINES, ROWS, parquet, write

from ds_local.data.corpus import prepare
from ds_local.data.dataset import TokenData
from ds_local.data.documents import Reading
from ds_local.data.left_out import Skipped
from ds_local.data.sources import documents
from ds_local.errors import DataError

TEXTS = [row["text"] for row in ROWS[:-3]] + [
    'two\nlines, "quoted" and; more\ttabs',
    " spaces around, a carriage return \r\nand ☃ \U0001f600 ",
    "a" + words(3000, 5),
]


def table(texts, delimiter=","):
    """A table as text; with another column before and one behind."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\n")
    writer.writerows([["id", "text", "more"], *([i, t, "x"] for i, t in enumerate(texts))])
    return buffer.getvalue().encode()


def zstd(content, frames=1):
    """Frames one after another, as parallel compressors write them."""
    size = -(-len(content) // frames)
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)


def lines(texts, **more):
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


FORMS = {
    "a.jsonl": lambda t: lines(t, id=3),
    "a.ndjson": lambda t: b"\n" + lines(t) + b" \n",
    "a.json": lambda t: json.dumps([{"text": text} for text in t], indent=1).encode(),
    "a.csv": table,
    "a.tsv": lambda t: table(t, "\t"),
    "a.parquet": lambda t: parquet(id=list(range(len(t))), text=t),
    "a.jsonl.gz": lambda t: gzip.compress(lines(t)),
    "a.jsonl.zst": lambda t: zstd(lines(t), 3),
    "a.jsonl.bz2": lambda t: bz2.compress(lines(t)),
    "a.jsonl.xz": lambda t: lzma.compress(lines(t)),
    "a.parquet.gz": lambda t: gzip.compress(parquet(text=t)),
    "a.csv.zst": lambda t: zstd(table(t, ";")),
    "a.json.xz": lambda t: lzma.compress(json.dumps(t).encode()),
}
OTHERS = {
    "b.JSONL": lines,
    "b.json": lines,
    "bytes.parquet": lambda t: parquet(text=[text.encode() for text in t]),
    "dictionary.parquet": lambda t: parquet(text=pa.array(t).dictionary_encode()),
    "bom.csv": lambda t: b"\xef\xbb\xbf" + table(t),
    "bom.json": lambda t: b"\xef\xbb\xbf" + json.dumps(t).encode(),
    "bom.jsonl": lambda t: b"\xef\xbb\xbf" + lines(t),
    "members.jsonl.gz": lambda t: gzip.compress(lines(t[:9])) + gzip.compress(lines(t[9:])),
    "members.jsonl.bz2": lambda t: bz2.compress(lines(t[:9])) + bz2.compress(lines(t[9:])),
    "members.jsonl.xz": lambda t: lzma.compress(lines(t[:9])) + lzma.compress(lines(t[9:])),
}


@pytest.mark.parametrize("name", FORMS | OTHERS)
def test_every_form_gives_the_same_documents(tmp_path, name):
    write(tmp_path / name, (FORMS | OTHERS)[name](TEXTS))
    assert "".join(d.text for d in documents([str(tmp_path / name)])) == "".join(TEXTS)
    assert [d.text for d in documents([str(tmp_path / name)])][: len(TEXTS) - 1] == TEXTS[:-1]


def test_all_forms_give_the_same_tokens(tmp_path, tokenizer):  # noqa: F811
    """Splits and fingerprint too: whether a document is held out does not depend on its form."""
    found = {}
    texts = TEXTS + [words(40, seed) for seed in range(100, 250)]
    for name, make in FORMS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / name, make(texts))
        output = tmp_path / f"{name} data"
        facts = prepare([str(tmp_path / name / name)], tokenizer, 16, output, 0.1, progress=False)
        data = TokenData(output, verify=False)
        found[name] = (
            facts["fingerprint"],
            *(data.sequences(s, range(data.num_sequences(s))).tolist() for s in facts["sequences"]),
        )
    first, *others = found.values()
    assert len(first[1]) > 1000 > len(first[2]) > 50
    assert all(other == first for other in others)


def test_a_folder_of_all_forms(tmp_path):
    for number, (name, make) in enumerate(FORMS.items()):
        write(tmp_path / f"{number:02}{name}", make([words(9, number)]))
    write(tmp_path / "plain.txt.gz", gzip.compress(b"plain"))
    found = [d.text for d in documents([str(tmp_path)])]
    assert found == [*(words(9, number) for number in range(len(FORMS))), "plain"]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("fields", "row", "text"),
    [
        (["content"], {"text": "no", "content": "yes"}, "yes"),
        (["meta.body"], {"meta": {"body": "yes", "x": 1}}, "yes"),
        (["a.b.c"], {"a": {"b": {"c": "yes"}}}, "yes"),
        (["a.b"], {"a.b": "yes"}, "yes"),
        (["content", "text"], {"text": "yes"}, "yes"),
        (["messages"], {"messages": [{"role": "user", "content": "yes"}]}, "user: yes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_any_field_may_hold_the_text(tmp_path, form, fields, row, text):
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    else:
        write(tmp_path / f"a.{form}", json.dumps([row] if form == "json" else row))
    reading = Reading(fields=fields)
    assert [d.text for d in documents([str(tmp_path / f"a.{form}")], reading)] == [text]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", ","), ("a.tsv", "\t")])
def test_tables_have_their_text_in_any_column(tmp_path, name, delimiter):
    write(tmp_path / name, table(TEXTS, delimiter).replace(b"text", b"my body"))
    reading = Reading(fields=["my body"])
    found = "".join(d.text for d in documents([str(tmp_path / name)], reading))
    assert found == "".join(TEXTS)


def test_a_table_is_read_in_batches(tmp_path, monkeypatch):
    """And of the columns only the one that is asked for."""
    write(tmp_path / "a.parquet", parquet(text=["some text"] * 5000, other=[{"a": 1}] * 5000))
    sizes = []
    whole = pq.ParquetFile.iter_batches

    def batches(*args, **how):
        for batch in whole(*args, **how):
            sizes.append((batch.num_rows, batch.schema.names))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", batches)
    found = documents([str(tmp_path / "a.parquet")])
    next(found)
    assert sizes == [(1000, ["text"])]
    assert sum(1 for _ in found) == 4999


def test_malformed_rows_are_left_out_up_to_a_number(tmp_path):
    bad = '{"text": "x\n{"body": 1}\n[1]\n'
    write(tmp_path / "a.jsonl", LINES + bad + LINES)
    write(tmp_path / "b.csv", "text,id\nfine,1\nshort\n")
    reading = Reading(Skipped(max_malformed=4))
    assert len(list(documents([str(tmp_path)], reading))) == 2 * len(ROWS) + 1
    assert reading.skipped.counts == {"malformed": 4}
    shown = reading.skipped.names["malformed"]
    assert shown[0].startswith(f"{tmp_path}/a.jsonl, line 31 is no JSON (")
    assert shown[3] == f"{tmp_path}/b.csv, line 3 has 1 fields, the header has 2"
    with one_sentence(
        "4 rows are malformed, more than --max-malformed 3", "line 31", error=DataError
    ):
        list(documents([str(tmp_path)], Reading(Skipped(max_malformed=3))))
