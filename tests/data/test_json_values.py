"""Values of JSON one by one, whatever the chunks in which a file is read."""

import io
import json

import pytest

from ds_local.data import json_values as module
from ds_local.data.json_values import json_values

VALUES = [{"a": [1, {"b": "]},["}]}, 'x\\"y☃', 12, -1.5e3, True, None, [], "", 123456789]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(VALUES),
        json.dumps(VALUES, indent=2),
        "\n\n" + json.dumps(VALUES, ensure_ascii=False) + "\n",
        "\n".join(map(json.dumps, VALUES)),
    ],
    ids=["a line", "indented", "space around", "one behind another"],
)
def test_the_same_values_from_all_chunks(monkeypatch, chunk, text):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert list(json_values(io.StringIO(text))) == VALUES


def test_nothing_and_an_empty_list():
    assert list(json_values(io.StringIO(" \n"))) == []
    assert list(json_values(io.StringIO(" [ ]\n"))) == []


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2", "ends in the middle of a list"),
        ("[1, ", "Expecting value"),
        ("[1 2]", "a comma is missing before '2"),
        ("[1] [2]", "more follows behind its list"),
        ('["a', "Unterminated string"),
        ("[1, }]", "Expecting value"),
        ('{"a": 1', "Expecting ',' delimiter"),
        ("words", "Expecting value"),
        ("[1,]", "Expecting value"),
    ],
)
def test_what_is_no_json(monkeypatch, chunk, text, said):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    with pytest.raises(ValueError, match=said):
        list(json_values(io.StringIO(text)))


def test_a_list_is_not_held(monkeypatch):
    """It is read no further than its values are asked for."""
    monkeypatch.setattr(module, "_CHUNK", 10)
    text = io.StringIO(json.dumps(["word"] * 1000))
    assert next(json_values(text)) == "word"
    assert text.tell() < 50


def test_a_value_without_an_end_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 10)
    monkeypatch.setattr(module, "_LONGEST", 100)
    text = io.StringIO('["' + "x" * 100_000)
    with pytest.raises(ValueError, match="longer than 100 characters"):
        list(json_values(text))
    assert text.tell() < 1000
