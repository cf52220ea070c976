"""The text of a row."""

import pytest

from ds_local.data.fields import Malformed, plain_chat, present, text_of


@pytest.mark.parametrize(
    ("row", "fields", "text"),
    [
        ({"text": "a"}, ["text"], "a"),
        ({"text": None}, ["text"], None),
        ({"text": b"a"}, ["text"], b"a"),
        ({"b": "2", "a": "1"}, ["a", "b"], "1"),
        ({"a": {"b": "2"}, "a.b": "1"}, ["a.b"], "1"),
        ({"a": {"b.c": "1"}}, ["a.b.c"], "1"),
        ({"m": []}, ["m"], ""),
        (
            {"m": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo", "x": 1}]},
            ["m"],
            "user: hi\n\nbot: yo",
        ),
    ],
)
def test_the_text_of_a_row(row, fields, text):
    assert text_of(row, fields) == text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (3, 'is int, not an object with a "text" field'),
        ({"a": 1, "b": 2}, 'has the fields a, b; an object with a "text" field is needed'),
        ({}, "has the fields none"),
        ({"text": 3}, '"text" is int, not a string'),
        ({"text": {"a": 1}}, '"text" is dict, not a string'),
        ({"text": ["a"]}, '"text" is list, not a string, nor messages with "role" and "content"'),
        ({"text": [{"role": "a"}]}, '"text" is list'),
        ({"text": [{"role": "a", "content": 3}]}, 'a message whose "content" is int'),
        (Malformed("is broken"), "is broken"),
    ],
)
def test_rows_without_a_text(row, said):
    with pytest.raises(Malformed, match=said):
        text_of(row, ["text"])


def test_what_a_template_refuses_is_said():
    def render(messages):
        raise RuntimeError("roles must alternate\nand more")

    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(Malformed, match=r'template refuses "m": roles must alternate$'):
        text_of({"m": messages}, ["m"], render)
    assert text_of({"m": messages}, ["m"], lambda m: plain_chat(m).upper()) == "USER: HI"


def test_which_of_the_fields_a_table_has():
    assert present(["x", "b.c", "a"], ["a", "b"]) == "b.c"
    assert present(["b.c"], ["b.c", "d"]) == "b.c"
    assert present(["x"], ["a"]) is None
