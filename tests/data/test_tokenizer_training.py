"""The text that a tokenizer is trained on."""

import pytest
from test_corpus import words

from ds_local.data import tokenizer_training
from ds_local.data.documents import Document
from ds_local.data.tokenizer_training import is_drawn, lines_of, train_sentencepiece


def test_lines_of_documents_in_pieces():
    pieces = [
        Document("a:0", "one\ntw", 0, False),
        Document("a:0", "o\nthree", 6, True),
        Document("b:0", "four\n", 0, True),
    ]
    assert list(lines_of(pieces)) == ["one", "two", "three", "four", ""]


def test_a_line_without_end_is_not_held():
    pieces = [Document("a:0", "x" * 5000, 5000 * i, False) for i in range(4)]
    found = list(lines_of([*pieces, Document("a:0", "y\nz", 20_000, True)]))
    assert [len(line) for line in found] == [4097, 1]


def test_of_much_text_some_of_all_is_drawn(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "SAMPLE", 100)
    read = []

    def documents():
        for number in range(400):
            read.append(number)
            yield Document(f"a:{number}", words(20, number))

    whole = train_sentencepiece(300, documents(), 50)
    part = train_sentencepiece(300, documents(), 400)
    assert len(whole) == len(part) == 300
    assert whole.get_vocab() != part.get_vocab()
    assert len(read) == 800  # from the first to the last
    assert part.get_vocab() == train_sentencepiece(300, documents(), 400).get_vocab()


def test_no_more_lines_are_taken_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "_MOST_CHARACTERS", 10)
    assert list(tokenizer_training._some_of(iter(["four", "five", "nine", "more"]))) == [
        "four",
        "five",
    ]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_is_drawn_by_name(share):
    drawn = sum(is_drawn(f"a:{number}", share) for number in range(4000))
    assert abs(drawn / 4000 - share) < 0.02
