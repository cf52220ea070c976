"""Documents from every form of file."""

import json

import pyarrow as pa
import pytest
from test_sources import LINES, ROWS, parquet, write

from ds_local.data.readers import Skipped
from ds_local.data.sources import documents


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
